"""The reward server and its client where all is well: what arrives, and how often it is scored."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import serving
from serving import blank, client, mean, pictures, serve

from flow_grpo.reward_server.__main__ import main
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.remote import wire
from flow_grpo.rewards.rules.jpeg import jpeg_incompressibility

ROOT = Path(__file__).parent.parent
HTTP = httpx.Client(verify=False)  # one: each loads certificates, which takes a while
EXACT = ("raw", "png", "webp")


def received(body: tuple[str, bytes], **limits) -> Batch:
    return wire.decode(*body, **({"max_items": 100, "max_pixels": 10**6} | limits))


@pytest.mark.parametrize("encoding", [*EXACT, "jpeg"])
def test_a_request_arrives_as_it_was_sent(encoding):
    images = [*pictures(2), np.stack(pictures(3, side=20))]  # two sizes, the last one a video
    references = [(images[1],), (), (images[0], images[1])]
    metadata = [{"include": [{"count": 3}], "x": 0.1}, {}, {"quote": '"\u201c\n'}]
    sent = Batch(images, ["a", "", "\u00e9"], metadata, references, np.array([7, 7, -2]))
    found = received(wire.encode(sent, encoding))
    assert (found.prompts, found.metadata) == (sent.prompts, sent.metadata)
    assert found.group.tolist() == [7, 7, -2] and found.errors is None
    pairs = [*zip(found.images, images, strict=True)]
    for ours, theirs in zip(found.references, references, strict=True):
        pairs += zip(ours, theirs, strict=True)
    assert len(pairs) == 6
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape and ours.dtype == np.uint8
        assert np.array_equal(ours, theirs) == (encoding in EXACT)


def test_what_was_not_sent_is_none():
    found = received(wire.encode(Batch(pictures(1), [""], [{}])))
    assert found.references is None and found.group is None


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_a_reward_over_http_gives_the_numbers_of_the_local_one(encoding):
    images, (prompts, metadata) = pictures(150, side=24), blank(150)

    def score(batch):
        return jpeg_incompressibility(batch.images, batch.prompts, batch.metadata)

    local = jpeg_incompressibility(images, prompts, metadata)["jpeg_incompressibility"]
    name = "jpeg_incompressibility"
    with serve(score, name=name) as server:
        with client(server.url, name=name, encoding=encoding) as reward:
            found = reward(images, prompts, metadata, None, np.arange(150) // 12)
    assert found[name].tolist() == local.tolist()  # to the last bit, in the same order


def test_nan_arrives_as_nan_and_other_columns_too():
    def score(batch):
        values = np.array([float(image.mean()) for image in batch.images])
        return {"mean": np.where(values > 127, values, np.nan), "row": np.arange(len(values))}

    images = pictures(40, side=2)
    truth = np.array([image.mean() for image in images])
    with serve(score) as server, client(server.url) as reward:
        found = reward(images, *blank(40))
    assert 5 < np.isnan(found["mean"]).sum() < 35
    np.testing.assert_array_equal(found["mean"], np.where(truth > 127, truth, np.nan))
    assert found["row"].tolist() == list(range(40))


def test_requests_that_wait_share_a_call_and_get_their_own_scores():
    calls, first = [], threading.Event()

    def score(batch):
        calls.append(len(batch))
        if len(calls) == 1:  # the others queue up behind it
            assert first.wait(30)
        return mean(batch)

    images = pictures(30, side=4)
    with serve(score, max_rows=16) as server, client(server.url) as reward:
        with ThreadPoolExecutor(30) as pool:
            futures = [pool.submit(reward, [image], *blank(1)) for image in images]
            serving.wait_for_requests(server, 30)
            first.set()
            found = [future.result(10)["mean"][0] for future in futures]
    assert found == [image.mean() for image in images]
    assert sum(calls) == 30 and max(calls) <= 16 and len(calls) <= 4


def test_groups_are_neither_split_nor_mixed_up():
    """Two clients use the same group numbers; each group of 5 must be seen whole and alone."""
    seen, go = [], threading.Event()

    def score(batch):
        if not seen:
            go.wait(10)
        seen.append(len(batch))
        sizes = {number: (batch.group == number).sum() for number in batch.group.tolist()}
        assert set(sizes.values()) == {5}
        return mean(batch) | {"size": np.array([sizes[n] for n in batch.group.tolist()])}

    images, group = pictures(20, side=4), np.arange(20) // 5
    with serve(score, max_rows=12) as server, client(server.url) as reward:
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(reward, images, *blank(20), None, group) for _ in range(4)]
            serving.wait_for_requests(server, 4)
            go.set()
            for future in futures:
                found = future.result(10)
                assert found["mean"].tolist() == [image.mean() for image in images]
    assert max(seen) <= 20 and sum(seen) == 80


def test_a_retry_with_the_same_id_is_not_scored_twice():
    calls, go = [], threading.Event()

    def score(batch):
        calls.append(len(batch))
        assert go.wait(10)
        return mean(batch)

    kind, body = wire.encode(Batch(pictures(3), *blank(3)))
    headers = {"content-type": kind, "idempotency-key": "one"}
    with serve(score) as server, ThreadPoolExecutor(2) as pool:
        url = f"{server.url}/score"
        with pytest.raises(httpx.ReadTimeout):
            HTTP.post(url, content=body, headers=headers, timeout=0.3)  # gives up
        again = pool.submit(HTTP.post, url, content=body, headers=headers)  # while it is scored
        time.sleep(0.2)
        go.set()
        first = again.result(10).json()
        assert HTTP.post(url, content=body, headers=headers).json() == first  # and afterwards
        assert calls == [3]
        other = headers | {"idempotency-key": "two"}
        assert HTTP.post(url, content=body, headers=other).json() == first and calls == [3, 3]


def test_several_urls_share_a_call_and_a_dead_one_is_left_out():
    dead = f"http://127.0.0.1:{serving.free_port()}"
    images = pictures(60, side=4)
    with serve(mean) as one, serve(mean) as two:
        with client(one.url, dead, two.url, timeout_s=10) as reward:
            for _ in range(3):
                found = reward(images, *blank(60))["mean"].tolist()
                assert found == [image.mean() for image in images]
    assert one.batcher.num_scored + two.batcher.num_scored == 180
    assert min(one.batcher.num_scored, two.batcher.num_scored) >= 40


def test_the_token_is_wanted_by_every_route_that_does_something():
    token = "0123456789abcdef"
    kind, body = wire.encode(Batch(pictures(1), *blank(1)))
    with serve(mean, token=token) as server:
        for given in ({}, {"authorization": "Bearer 0123456789abcdeX"}, {"authorization": token}):
            post = HTTP.post(
                f"{server.url}/score", content=body, headers=given | {"content-type": kind}
            )
            health = HTTP.get(f"{server.url}/health", headers=given)
            assert post.status_code == health.status_code == 401
        with client(server.url, token=token) as reward:
            assert reward(pictures(1), *blank(1))["mean"].shape == (1,)
        with client(server.url, token=token[::-1]) as reward:
            with pytest.raises(RuntimeError, match="401.*bearer token") as error:
                reward(pictures(1), *blank(1))
    assert token not in str(error.value)


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (["--host=0.0.0.0"], "--token-file is needed"),
        (["--host=::"], "--token-file is needed"),
        (["--host=my-machine"], "--token-file is needed"),
        (["--token-file=missing"], "can't be read"),
        (["--set=pickscor=x"], "--set=pickscor=x: KEY=VALUE is needed"),
    ],
)
def test_a_server_does_not_start_without_what_it_needs(argv, complaint):
    with pytest.raises(SystemExit) as exit:
        main(["--reward=shapes", "--port=1", *argv])
    assert complaint in str(exit.value)


def test_an_unknown_reward_is_an_error_that_names_the_nearest():
    with pytest.raises(SystemExit, match="Did you mean 'shapes'"):
        main(["--reward=shaps", "--port=1"])


def test_short_tokens_are_refused(tmp_path):
    (tmp_path / "token").write_text("short\n")
    with pytest.raises(SystemExit, match="at least 16 characters"):
        main(["--reward=shapes", "--port=1", "--host=0.0.0.0", f"--token-file={tmp_path}/token"])


def test_sigterm_lets_a_server_finish_what_it_has_taken_in(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text(
        "import time, numpy\n"
        "def slow(images, prompts, metadata, references=None, group=None):\n"
        "    time.sleep(0.5)\n"
        "    return {'slow': numpy.array([float(x.mean()) for x in images])}\n"
    )
    port, images = serving.free_port(), pictures(3, side=4)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    process = serving.start("slow:slow", port, "--batch-size=1", "--linger-ms=0")
    kind, body = wire.encode(Batch(images, *blank(3)))
    with ThreadPoolExecutor(2) as pool:
        send = dict(content=body, headers={"content-type": kind}, timeout=20)
        futures = [
            pool.submit(HTTP.post, f"http://127.0.0.1:{port}/score", **send) for _ in range(2)
        ]
        time.sleep(0.4)
        process.send_signal(signal.SIGTERM)
        answers = [future.result(20) for future in futures]
    for answer in answers:  # 6 pictures of half a second each
        assert answer.json()["scores"]["slow:slow"] == [image.mean() for image in images]
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0, output


def test_metrics_and_openapi_say_what_was_done():
    with serve(mean) as server, client(server.url) as reward:
        reward(pictures(5), *blank(5))
        lines = HTTP.get(f"{server.url}/metrics").text.splitlines()
        found = dict(line.rsplit(" ", 1) for line in lines)
        assert found["reward_pictures_total"] == "5" and found["reward_calls_total"] == "1"
        assert found['reward_requests_total{status="200"}'] == "1"
        paths = HTTP.get(f"{server.url}/openapi.json").json()["paths"]
        assert set(paths) == {"/health", "/metrics", "/score"}
        content = paths["/score"]["post"]["requestBody"]["content"]
        assert set(content) == {wire.EXACT, wire.PACKED}
        assert HTTP.get(f"{server.url}/docs").status_code == 404


def test_nothing_of_http_is_imported_by_a_run_that_does_not_use_it():
    code = """import sys, flow_grpo.launch.preflight, flow_grpo.rewards.combine as combine
combine.Scorer({"shapes": 1.0}, {}).close()
assert not {"httpx", "fastapi", "uvicorn", "msgpack"} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_nothing_here_unpickles():
    files = [
        *(ROOT / "flow_grpo/reward_server").glob("*.py"),
        *(ROOT / "flow_grpo/rewards").rglob("*.py"),
    ]
    assert len(files) > 10
    for path in files:
        assert "import pickle" not in path.read_text() and "allow_pickle" not in path.read_text()


def test_an_answer_is_plain_json():
    scores = {"a": np.array([1.5, np.nan])}
    answer = wire.encode_answer(scores, [None, "bad"])
    assert json.loads(json.dumps(answer)) == {
        "scores": {"a": [1.5, None]},
        "errors": [None, "bad"],
    }
