"""The reward server and its client where all is well: what arrives, and how often it is scored."""

from __future__ import annotations

import ast
import json
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import serving
from PIL import Image
from serving import HANG_S, HTTP, client, mean, pictures, rows, serve

from flow_grpo.reward_server.__main__ import main
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.registry import REWARDS
from flow_grpo.rewards.remote import health, wire
from flow_grpo.rewards.remote.servers import Servers
from flow_grpo.rewards.rules.jpeg import jpeg_incompressibility

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("patient")


def received(body: bytes) -> Batch:
    return wire.decode(body, max_items=100, max_pixels=10**6)


@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_a_request_arrives_as_it_was_sent(encoding):
    images = [*pictures(2), np.stack(pictures(3, side=20))]  # two sizes, the last one a video
    images.append(images[2][:1])  # of one frame
    references = [(images[1],), (), (images[0], images[1]), ()]
    metadata = [{"include": [{"count": 3}], "x": 0.1}, {}, {"quote": '"\u201c\n'}, {}]
    sent = Batch(images, ["a", "", "\u00e9", "b"], metadata, references, np.array([7, 7, -2, 3]))
    found = received(wire.encode(sent, encoding))
    assert (found.prompts, found.metadata) == (sent.prompts, sent.metadata)
    assert found.group.tolist() == [7, 7, -2, 3] and found.errors is None
    pairs = [*zip(found.images, images, strict=True)]
    for ours, theirs in zip(found.references, references, strict=True):
        pairs += zip(ours, theirs, strict=True)
    assert len(pairs) == 7
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape and ours.dtype == np.uint8
        assert np.array_equal(ours, theirs) == (encoding == "raw")


def test_a_jpeg_arrives_as_the_file_that_pil_writes_is_read():
    (image,), file = pictures(1, side=40), BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95, subsampling=0)
    found = received(wire.encode(rows([image]), "jpeg"))
    assert np.array_equal(found.images[0], np.asarray(Image.open(file)))


def test_what_was_not_sent_is_none():
    found = received(wire.encode(rows(pictures(1))))
    assert found.references is None and found.group is None


def test_a_reward_over_http_gives_the_numbers_of_the_local_one():
    batch, name = rows(pictures(150, side=24), group=np.arange(150) // 12), "jpeg_incompressibility"
    local = jpeg_incompressibility(batch)[name]
    with serve(jpeg_incompressibility, name=name) as server:
        with client(server.url, name=name) as reward:
            found = reward(batch)
    assert found[name].tolist() == local.tolist()  # to the last bit, in the same order


def test_nan_arrives_as_nan_and_other_columns_too():
    def score(batch):
        values = np.array([float(image.mean()) for image in batch.images])
        return {"mean": np.where(values > 127, values, np.nan), "row": np.arange(len(values))}

    images = pictures(40, side=2)
    truth = np.array([image.mean() for image in images])
    with serve(score) as server, client(server.url) as reward:
        found = reward(rows(images))
    assert 5 < np.isnan(found["mean"]).sum() < 35
    np.testing.assert_array_equal(found["mean"], np.where(truth > 127, truth, np.nan))
    assert found["row"].tolist() == list(range(40))


def test_requests_that_wait_share_a_call_and_get_their_own_scores():
    calls, first = [], threading.Event()

    def score(batch):
        calls.append(len(batch))
        if len(calls) == 1:  # the others queue up behind it
            assert first.wait(HANG_S)
        return mean(batch)

    images = pictures(30, side=4)
    with serve(score, max_rows=16) as server, client(server.url) as reward:
        with ThreadPoolExecutor(30) as pool:
            futures = [pool.submit(reward, rows([image])) for image in images]
            serving.wait_for_requests(server, 30)
            first.set()
            found = [future.result(HANG_S)["mean"][0] for future in futures]
    assert found == [image.mean() for image in images]
    assert sum(calls) == 30 and max(calls) <= 16 and len(calls) <= 4


def test_groups_are_neither_split_nor_mixed_up():
    """Two clients use the same group numbers; each group of 5 must be seen whole and alone."""
    seen, go = [], threading.Event()

    def score(batch):
        if not seen:
            assert go.wait(HANG_S)
        seen.append(len(batch))
        sizes = {number: (batch.group == number).sum() for number in batch.group.tolist()}
        assert set(sizes.values()) == {5}
        return mean(batch) | {"size": np.array([sizes[n] for n in batch.group.tolist()])}

    images, group = pictures(20, side=4), np.arange(20) // 5
    with serve(score, max_rows=12) as server, client(server.url) as reward:
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(reward, rows(images, group=group)) for _ in range(4)]
            serving.wait_for_requests(server, 4)
            go.set()
            for future in futures:
                found = future.result(HANG_S)
                assert found["mean"].tolist() == [image.mean() for image in images]
    assert max(seen) <= 20 and sum(seen) == 80


def test_a_retry_with_the_same_id_is_not_scored_twice():
    calls, go = [], threading.Event()

    def score(batch):
        calls.append(len(batch))
        assert go.wait(HANG_S)
        return mean(batch)

    body = wire.encode(rows(pictures(3)))
    headers = {"content-type": wire.CONTENT_TYPE, "idempotency-key": "one"}
    with serve(score) as server, ThreadPoolExecutor(2) as pool:
        url, port = f"{server.url}/score", int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as gives_up:
            lines = [f"{key}: {value}" for key, value in headers.items()]
            lines = ["POST /score HTTP/1.1", "host: x", f"content-length: {len(body)}", *lines]
            gives_up.sendall("\r\n".join([*lines, "", ""]).encode() + body)
            serving.wait_until(lambda: calls == [3])
        again = pool.submit(HTTP.post, url, content=body, headers=headers)  # while it is scored
        serving.wait_for_requests(server, 2)
        go.set()
        first = again.result(HANG_S).json()
        assert HTTP.post(url, content=body, headers=headers).json() == first  # and afterwards
        assert calls == [3]
        other = headers | {"idempotency-key": "two"}
        assert HTTP.post(url, content=body, headers=other).json() == first and calls == [3, 3]


def test_several_urls_share_a_call_and_a_dead_one_is_left_out():
    dead = f"http://127.0.0.1:{serving.free_port()}"
    images = pictures(60, side=4)
    with serve(mean) as one, serve(mean) as two:
        with client(one.url, dead, two.url) as reward:
            for _ in range(3):
                found = reward(rows(images))["mean"].tolist()
                assert found == [image.mean() for image in images]
    assert one.batcher.num_scored + two.batcher.num_scored == 180
    assert min(one.batcher.num_scored, two.batcher.num_scored) >= 40


def test_the_token_is_wanted_by_every_route_that_does_something():
    token = "0123456789abcdef"
    body, kind = wire.encode(rows(pictures(1))), wire.CONTENT_TYPE
    with serve(mean, token=token) as server:
        for given in ({}, {"authorization": "Bearer 0123456789abcdeX"}, {"authorization": token}):
            post = HTTP.post(
                f"{server.url}/score", content=body, headers=given | {"content-type": kind}
            )
            get = HTTP.get(f"{server.url}/health", headers=given)
            assert post.status_code == get.status_code == 401
        with client(server.url, token=token) as reward:
            assert reward(rows(pictures(1)))["mean"].shape == (1,)
        with client(server.url, token=token[::-1]) as reward:
            with pytest.raises(RuntimeError, match="401.*bearer token") as error:
                reward(rows(pictures(1)))
        with pytest.raises(ValueError, match="wants another token than that of config.reward_tok"):
            health.check(Servers({"mean": [server.url]}, token=token[::-1]))
        assert health.check(Servers({"mean": [server.url]}, token=token)) == set()
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
        "import pathlib, time, numpy\n"
        "def slow(images):\n"
        f"    while not pathlib.Path({str(tmp_path / 'go')!r}).exists():\n"
        "        time.sleep(0.01)\n"
        "    return {'slow': numpy.array([float(x.mean()) for x in images])}\n"
    )
    port, images = serving.free_port(), pictures(3, side=4)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    process = serving.start("slow:slow", port, "--batch-size=1", "--linger-ms=0")
    url = f"http://127.0.0.1:{port}"
    send = {"content": wire.encode(rows(images)), "headers": {"content-type": wire.CONTENT_TYPE}}
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(HTTP.post, f"{url}/score", **send) for _ in range(2)]
        serving.wait_until(lambda: HTTP.get(f"{url}/health").json()["waiting"] == 2)
        process.send_signal(signal.SIGTERM)
        serving.wait_until(lambda: not listens(port))
        (tmp_path / "go").touch()
        answers = [future.result(HANG_S) for future in futures]
    for answer in answers:  # 6 calls of an image each
        assert answer.json()["scores"]["slow:slow"] == [image.mean() for image in images]
    output, _ = process.communicate(timeout=HANG_S)
    assert process.returncode == 0, output


def listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port)):
            return True
    except ConnectionRefusedError:
        return False


def test_metrics_and_openapi_say_what_was_done():
    with serve(mean) as server, client(server.url) as reward:
        reward(rows(pictures(5)))
        lines = HTTP.get(f"{server.url}/metrics").text.splitlines()
        found = dict(line.rsplit(" ", 1) for line in lines)
        assert found["reward_pictures_total"] == "5" and found["reward_calls_total"] == "1"
        assert found['reward_requests_total{status="200"}'] == "1"
        paths = HTTP.get(f"{server.url}/openapi.json").json()["paths"]
        assert set(paths) == {"/health", "/metrics", "/score"}
        content = paths["/score"]["post"]["requestBody"]["content"]
        assert set(content) == {wire.CONTENT_TYPE}
        assert HTTP.get(f"{server.url}/docs").status_code == 404


@pytest.mark.slow
def test_nothing_of_http_is_imported_by_a_run_that_does_not_use_it():
    code = """import sys, flow_grpo.launch.preflight, flow_grpo.rewards.combine as combine
combine.Scorer({"shapes": 1.0}, {}).close()
assert not {"httpx", "fastapi", "uvicorn", "tenacity"} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


BLOCKED = ("torch", "transformers", "diffusers", "peft", "accelerate", "scipy", "httpx", "tenacity")


def test_the_registry_and_the_server_import_where_the_rewards_packages_are_missing():
    """And a reward scores there."""
    code = f"""import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
from flow_grpo.rewards.registry import REWARDS
from flow_grpo.reward_server import app, __main__ as server
assert len(REWARDS) > 15
try:
    server.main(["--help"])
except SystemExit as exit:
    assert not exit.code
import numpy
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.combine import Scorer
scorer = Scorer({{"jpeg_compressibility": 1.0}}, {{}})
print(scorer.score(Batch([numpy.zeros((8, 8, 3), numpy.uint8)], [""], [{{}}]))["avg"])
scorer.close()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "[-0.0" in done.stdout, done.stderr


@pytest.mark.parametrize("module", sorted({found.__module__ for found in REWARDS.values()}))
def test_a_reward_s_module_imports_numpy_and_pil_alone_at_its_top(module):
    names = set()
    for node in ast.parse(Path(sys.modules[module].__file__).read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names - sys.stdlib_module_names <= {"numpy", "PIL", "flow_grpo"}


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
