"""Reward servers that fail, and clients that are hostile: no hang, no invented score."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import httpx
import msgpack
import numpy as np
import pytest
import serving
from PIL import Image
from safetensors.numpy import save
from serving import blank, client, faulty, mean, pictures, reply, serve

from config.base import base
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.combine import Scorer
from flow_grpo.rewards.remote import client as remote
from flow_grpo.rewards.remote import servers, wire
from flow_grpo.rewards.remote.client import Refused, Unavailable
from flow_grpo.rewards.remote.servers import Servers, SomeFailed

GOOD = {"scores": {"mean": [1.0, 2.0]}, "errors": [None, None]}
HTTP = httpx.Client(verify=False)  # one: each loads certificates, which takes a while
SLACK_S = 3.0  # of a busy machine


def call(reward, count=2):
    return reward(pictures(count), *blank(count))


def configured(**keys):
    config = base()
    with config.unlocked():
        config.update(keys)
    return config


# What a server may do to a client.


def test_a_dead_server_is_given_up_at_the_deadline_and_then_not_asked_for_a_while():
    url = f"http://127.0.0.1:{serving.free_port()}"
    with client(url, timeout_s=1.5) as reward:
        start = time.monotonic()
        with pytest.raises(Unavailable, match=f"{url}: no scores.*config.reward_timeout=1.5"):
            call(reward)
        assert time.monotonic() - start < 1.5 + SLACK_S
        start = time.monotonic()
        with pytest.raises(Unavailable, match="not tried again within"):
            call(reward)
        assert time.monotonic() - start < 0.5


def test_the_circuit_closes_once_the_server_is_healthy_again(monkeypatch):
    monkeypatch.setattr(remote, "COOL_DOWN_S", 0.2)
    state = {"up": False}

    def answer(handler, number):
        if not state["up"]:
            reply(handler, 503, {"detail": "loading", "reward": "mean"})
        elif handler.command == "GET":
            reply(handler, 200, {"reward": "mean"})
        else:
            reply(handler, 200, GOOD)

    with faulty(answer) as (url, seen), client(url, timeout_s=0.5) as reward:
        with pytest.raises(Unavailable, match=f"{url}: no scores after"):
            call(reward)
        time.sleep(0.3)
        with pytest.raises(Unavailable, match="is not healthy: status 503"):
            call(reward)
        assert seen[-1] == "health"  # nothing was uploaded
        state["up"] = True
        time.sleep(0.3)
        assert call(reward)["mean"].tolist() == [1, 2]


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_a_busy_server_is_asked_again_under_the_same_id(status):
    def answer(handler, number):
        if number < 3:
            reply(handler, status, {"detail": "later"}, retry_after="0.1")
        else:
            reply(handler, 200, GOOD)

    with faulty(answer) as (url, seen), client(url) as reward:
        assert call(reward)["mean"].tolist() == [1, 2]
    assert len(seen) == 3 and len({headers["idempotency-key"] for headers in seen}) == 1


def test_a_scorer_that_fails_is_tried_three_times():
    with faulty(lambda handler, _: reply(handler, 500, {"detail": "CUDA"})) as (url, seen):
        with client(url) as reward, pytest.raises(Refused, match=f"{url}: status 500: CUDA"):
            call(reward)
    assert len(seen) == 3


@pytest.mark.parametrize("status", [301, 400, 401, 404, 411, 413, 415])
def test_any_other_status_is_final(status):
    def answer(handler, _):
        reply(handler, status, b"<html>", location="http://127.0.0.1:9/")

    with faulty(answer) as (url, seen), client(url) as reward:
        with pytest.raises(Refused, match=f"{url}: status {status}: b'<html>'"):
            call(reward)
    assert len(seen) == 1


def answers():
    def with_scores(**scores):
        return {"scores": scores, "errors": [None, None]}

    return {
        "nothing": b"",
        "html": b"<html>gateway</html>",
        "pickle": b"\x80\x04\x95\x10\x00.",
        "binary": bytes(range(256)) * 10,
        "list": [1.0, 2.0],
        "no scores": {"errors": [None, None]},
        "no errors": {"scores": {"mean": [1.0, 2.0]}},
        "errors of another length": GOOD | {"errors": [None]},
        "another reward": with_scores(median=[1.0, 2.0]),
        "too short": with_scores(mean=[1.0]),
        "too long": with_scores(mean=[1.0, 2.0, 3.0]),
        "another column too short": with_scores(mean=[1.0, 2.0], more=[1.0]),
        "a number": with_scores(mean=1.0),
        "strings": with_scores(mean=["1.0", "2.0"]),
        "booleans": with_scores(mean=[True, False]),
        "nested": with_scores(mean=[[1.0], [2.0]]),
        "NaN": b'{"scores": {"mean": [NaN, 1.0]}, "errors": [null, null]}',
        "infinity": b'{"scores": {"mean": [Infinity, 1.0]}, "errors": [null, null]}',
        "overflow": b'{"scores": {"mean": [1e999, 1.0]}, "errors": [null, null]}',
        "huge integer": with_scores(mean=[10**400, 1.0]),
        "deep": b'{"scores": ' + b"[" * 100_000,
    }


@pytest.mark.parametrize("name", answers())
def test_a_garbage_answer_is_an_error_and_never_a_score(name):
    with faulty(lambda handler, _: reply(handler, 200, answers()[name])) as (url, seen):
        with client(url) as reward, pytest.raises(Refused, match=url):
            call(reward)
    assert len(seen) == 1


def test_an_endless_answer_is_cut_off(monkeypatch):
    monkeypatch.setattr("flow_grpo.rewards.remote.exchange.MAX_ANSWER_BYTES", 10_000)
    with faulty(lambda handler, _: reply(handler, 200, b" " * 10**6)) as (url, _):
        with client(url) as reward, pytest.raises(Refused, match="more than 10000 bytes"):
            call(reward)


@pytest.mark.parametrize("when", ["connected", "in the head", "in the body"])
def test_a_server_that_drips_a_byte_now_and_then_does_not_outlast_the_deadline(when):
    """Each read succeeds, so a timeout of reads would wait for ever."""
    listener, ended = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def drip():
        peer, _ = listener.accept()
        with peer:
            if when == "in the body":
                peer.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n")
            elif when == "in the head":
                peer.sendall(b"HTTP/1.1 200 OK\r\nx: ")
            try:
                while not ended.wait(0.05):
                    if when != "connected":
                        peer.sendall(b"1")
            except OSError:
                pass

    threading.Thread(target=drip, daemon=True).start()
    start = time.monotonic()
    with client(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=1) as reward:
        with pytest.raises(Unavailable, match="no answer within"):
            call(reward)
    assert time.monotonic() - start < 1 + SLACK_S
    ended.set()
    listener.close()


def test_a_server_that_hangs_up_is_asked_again():
    def answer(handler, number):
        if number == 1:
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
        else:
            reply(handler, 200, GOOD)

    with faulty(answer) as (url, seen), client(url) as reward:
        assert call(reward)["mean"].tolist() == [1, 2]
    assert len(seen) == 2


def test_a_slow_scorer_is_found_again_by_a_retry_and_a_slower_one_is_given_up():
    calls = []

    def slow(batch):
        calls.append(len(batch))
        time.sleep(1.2 if len(calls) == 1 else 5)
        return mean(batch)

    with serve(slow) as server, client(server.url, timeout_s=2) as reward:
        assert call(reward)["mean"].shape == (2,)  # the first attempt ended after a second
        assert calls == [2]
        start = time.monotonic()
        with pytest.raises(Unavailable, match="no answer within"):
            call(reward)
        assert time.monotonic() - start < 2 + SLACK_S and calls == [2, 2]


def test_a_stuck_scorer_makes_the_server_say_so():
    go = threading.Event()

    def stuck(batch):
        go.wait(20)
        return mean(batch)

    with serve(stuck, timeout_s=0.5) as server:
        kind, body = wire.encode(Batch(pictures(1), *blank(1)))
        send = dict(content=body, headers={"content-type": kind})
        assert HTTP.post(f"{server.url}/score", **send).status_code == 504
        time.sleep(0.1)
        health = HTTP.get(f"{server.url}/health")
        assert health.status_code == 503 and "stuck" in health.json()["detail"]
        assert HTTP.post(f"{server.url}/score", **send).status_code == 503  # nothing piles up
        go.set()
        time.sleep(0.2)
        assert HTTP.post(f"{server.url}/score", **send).status_code == 200


# What a client may do to a server.


def picky(batch):
    """Refuses a row whose metadata has no "n"."""
    return {"mean": np.array([float(row["n"]) for row in batch.metadata])}


def test_a_row_that_cannot_be_scored_has_an_error_and_the_others_their_scores():
    rows = [{"n": 3}, {}, {"n": [1]}, {"n": 5}]
    with serve(picky) as server, client(server.url) as reward:
        with pytest.raises(SomeFailed, match="2 of 4 rows have errors; row 1: KeyError") as error:
            reward(pictures(4), [""] * 4, rows)
        np.testing.assert_array_equal(error.value.scores["mean"], [3, np.nan, np.nan, 5])
        with pytest.raises(SomeFailed, match="1 of 1 rows have errors") as error:
            reward(pictures(1), [""], [{}])
        assert np.isnan(error.value.scores["mean"]).all()
        assert reward(pictures(1), [""], [{"n": 2}])["mean"] == [2]  # the circuit stayed closed


def test_one_client_s_bad_rows_do_not_spoil_another_s_call():
    def late(batch):
        time.sleep(0.1)
        return picky(batch)

    with serve(late) as server, client(server.url) as good, client(server.url) as bad:
        with ThreadPoolExecutor(12) as pool:
            fine = [pool.submit(good, pictures(1), [""], [{"n": n}]) for n in range(8)]
            wrong = [pool.submit(bad, pictures(1), [""], [{}]) for _ in range(4)]
            assert [future.result(20)["mean"][0] for future in fine] == list(range(8))
            assert all(isinstance(future.exception(20), SomeFailed) for future in wrong)


def test_an_unreadable_picture_is_its_row_s_error_alone():
    files = [b"\x89PNG garbage", b"", "text", [], [png(2), png(3)], png(4)]
    rows = json.dumps({"prompts": [""] * 6, "metadata": [{}] * 6, "group": None})
    body = msgpack.packb({"images": files, "references": None, "rows": rows})
    with serve(mean) as server:
        answer = post(server.url, body, wire.PACKED).json()
    assert [error is None for error in answer["errors"]] == [False] * 5 + [True]
    assert answer["scores"]["mean"] == [None] * 5 + [0.0]


def png(side: int) -> bytes:
    file = BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG")
    return file.getvalue()


def post(url: str, body: bytes, kind: str = wire.EXACT, **headers) -> httpx.Response:
    return HTTP.post(f"{url}/score", content=body, headers={"content-type": kind} | headers)


def exact(rows: object, tensors: dict | None = None) -> bytes:
    text = rows if isinstance(rows, str) else json.dumps(rows)
    given = {"image/0": np.zeros((2, 2, 3), np.uint8)} if tensors is None else tensors
    return save(given, metadata={"rows": text})


ONE = {"prompts": [""], "metadata": [{}], "group": None}


def hostile() -> dict[str, tuple[bytes, int]]:
    rows = {
        "deep": '{"prompts": [""], "metadata": [' + '{"a":' * 50_000 + "1" + "}" * 50_000 + "]}",
        "not JSON": "{",
        "NaN": '{"prompts": [""], "metadata": [{"a": NaN}]}',
        "a list": [],
        "no metadata": {"prompts": [""]},
        "metadata of numbers": ONE | {"metadata": [1]},
        "prompts of numbers": ONE | {"prompts": [1]},
        "other lengths": ONE | {"metadata": [{}, {}]},
        "no rows": {"prompts": [], "metadata": []},
        "more rows than pictures": {"prompts": ["", ""], "metadata": [{}, {}]},
        "group of floats": ONE | {"group": [1.5]},
        "group beyond 64 bits": ONE | {"group": [2**70]},
        "group of booleans": ONE | {"group": [True]},
    }
    found = {name: (exact(row), 400) for name, row in rows.items()}
    picture = np.zeros((2, 2, 3), np.uint8)
    found |= {
        "nothing": (b"", 400),
        "zeros": (bytes(100), 400),
        "a header beyond the body": (b"\xff" * 100, 400),
        "a pickle": (b"\x80\x04\x95\x10\x00.", 400),
        "no metadata at all": (save({"image/0": picture}), 400),
        "a picture too many": (exact(ONE, {"image/0": picture, "image/1": picture}), 400),
        "another name": (exact(ONE, {"image/00": picture}), 400),
        "floats": (exact(ONE, {"image/0": picture.astype(np.float32)}), 422),
        "two channels": (exact(ONE, {"image/0": picture[..., :2]}), 422),
        "an empty picture": (exact(ONE, {"image/0": picture[:0]}), 422),
        "too many rows": (exact({"prompts": [""] * 101, "metadata": [{}] * 101}), 413),
        "too many pixels": (exact(ONE, {"image/0": np.zeros((101, 100, 3), np.uint8)}), 413),
        "a huge string": (exact(ONE | {"prompts": ["x" * (wire.MAX_ROWS_BYTES + 1)]}), 413),
    }
    return found


def test_hostile_bodies_are_refused_and_the_server_goes_on():
    with serve(mean, items=100, pixels=10_000) as server:
        for name, (body, status) in hostile().items():
            answer = post(server.url, body)
            assert answer.status_code == status, (name, answer.text[:300])
            assert len(answer.text) < 1000 and "scores" not in answer.json(), name
        assert post(server.url, exact(ONE)).json()["scores"] == {"mean": [0.0]}
        assert server.batcher.num_scored == 1


@pytest.mark.parametrize(
    "body",
    [
        b"\x91" * 5000 + b"\xc0",
        b"\xdd\xff\xff\xff\xff",
        b"\xc1",
        msgpack.packb([]),
        msgpack.packb({"images": [b""], "rows": 1}),
        msgpack.packb({"images": 1, "rows": "{}"}),
        msgpack.packb({"images": [b""], "references": [1], "rows": "{}"}),
        b"",
    ],
)
def test_hostile_msgpack_is_refused(body):
    with pytest.raises(wire.Malformed):
        wire.decode(wire.PACKED, body, 10, 100)


def test_a_picture_that_unpacks_to_too_many_pixels_is_refused_before_it_is_unpacked():
    file = BytesIO()
    Image.new("1", (9000, 9000)).save(file, "PNG")  # 10 kB
    rows = json.dumps(ONE)
    body = msgpack.packb({"images": [file.getvalue()], "references": None, "rows": rows})
    assert len(body) < 20_000
    with serve(mean, pixels=10**7) as server:
        answer = post(server.url, body, wire.PACKED)
        assert answer.status_code == 413 and "10000000 pixels" in answer.text


def test_what_does_not_fit_is_refused_before_it_is_read():
    with serve(mean, body_bytes=1000) as server:
        assert post(server.url, bytes(1001)).status_code == 413
        assert post(server.url, exact(ONE), "application/octet-stream").status_code == 415
        chunked = HTTP.post(
            f"{server.url}/score", content=iter([b"x"]), headers={"content-type": wire.EXACT}
        )
        assert chunked.status_code == 411
        assert post(server.url, exact(ONE), **{"idempotency-key": "x" * 200}).status_code == 400


def test_a_full_queue_says_when_to_come_back():
    go = threading.Event()

    def wait(batch):
        go.wait(20)
        return mean(batch)

    with serve(wait, queue=2) as server, ThreadPoolExecutor(2) as pool:
        held = [pool.submit(post, server.url, exact(ONE)) for _ in range(2)]
        serving.wait_for_requests(server, 2)
        answer = post(server.url, exact(ONE))
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        go.set()
        assert [future.result(20).status_code for future in held] == [200, 200]
        assert post(server.url, exact(ONE)).status_code == 200


def test_a_thousand_calls_at_once_are_all_answered_with_their_own_scores():
    images = pictures(1000, side=2)
    with serve(mean) as server, client(server.url, timeout_s=600) as reward:
        with ThreadPoolExecutor(1000) as pool:
            found = list(pool.map(lambda image: reward([image], *blank(1))["mean"][0], images))
        assert found == [image.mean() for image in images]
        assert server.batcher.num_scored == 1000  # none twice


def test_a_thousand_connections_at_once_get_their_scores_or_are_told_to_wait():
    images = pictures(1000, side=2)

    async def ask(port: int, image: np.ndarray) -> tuple[int, list]:
        kind, body = wire.encode(Batch([image], *blank(1)))
        head = f"POST /score HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await opened.wait(1000)
        writer.write(head.encode() + body)
        answer = await reader.read()
        writer.close()
        found = json.loads(answer.partition(b"\r\n\r\n")[2])
        return int(answer.split()[1]), found.get("scores", {}).get("mean")

    async def ask_all(port: int) -> list:
        return await asyncio.wait_for(asyncio.gather(*(ask(port, x) for x in images)), 600)

    opened = Crowd()
    with serve(lambda batch: (time.sleep(0.05), mean(batch))[1], queue=100) as server:
        answers = asyncio.run(ask_all(int(server.url.rpartition(":")[2])))
        scored = [(n, scores) for n, (status, scores) in enumerate(answers) if status == 200]
        assert {status for status, _ in answers} == {200, 429} and len(scored) >= 100
        assert all(scores == [images[n].mean()] for n, scores in scored)
        metrics = HTTP.get(f"{server.url}/metrics").text
        assert "reward_waiting_requests 0\nreward_waiting_bytes 0" in metrics


class Crowd:
    """Lets all go once so many have come."""

    def __init__(self):
        self._count, self._all = 0, asyncio.Event()

    async def wait(self, count: int) -> None:
        self._count += 1
        if self._count == count:
            self._all.set()
        await self._all.wait()


# At start-up, and what a run makes of failures.


def test_a_server_that_is_down_at_start_is_named_within_ten_seconds():
    down = f"http://127.0.0.1:{serving.free_port()}"
    silent = socket.create_server(("127.0.0.1", 0))
    hangs = f"http://127.0.0.1:{silent.getsockname()[1]}"
    with serve(mean, name="pickscore") as server:
        for url, says in ((down, "does not answer"), (hangs, "does not answer within 5 s")):
            start = time.monotonic()
            with pytest.raises(ValueError, match=f"'pickscore' at {url} {says}"):
                servers.check(Servers({"pickscore": [server.url, url]}))
            assert time.monotonic() - start < 10
        servers.check(Servers({"pickscore": [server.url]}))
        with pytest.raises(ValueError, match="serves another reward, 'pickscore'. Start it"):
            servers.check(Servers({"ocr": [server.url]}))
    silent.close()


def test_something_else_than_a_reward_server_is_named():
    with faulty(lambda handler, _: reply(handler, 200, b"<html>")) as (url, _):
        with pytest.raises(ValueError, match=f"{url} is no reward server: GET /health gives"):
            servers.check(Servers({"mean": [url]}))


@pytest.mark.parametrize(
    "keys, complaint",
    [
        ({"reward_urls": {"shapes": ["localhost:18085"]}}, "is no http://HOST:PORT"),
        ({"reward_urls": {"shapes": ["http://"]}}, "is no http://HOST:PORT"),
        ({"reward_urls": {"shapes": ["http://a:99999"]}}, "is no http://HOST:PORT"),
        ({"reward_urls": {"shapes": [7]}}, "is no http://HOST:PORT"),
        ({"reward_urls": {"shapes": []}}, "one URL or several different ones"),
        ({"reward_urls": {"shapes": ["http://a:1", "http://a:1"]}}, "several different ones"),
        ({"reward_urls": {"ocr": ["http://a:1"]}}, "neither config.reward_fn nor"),
    ],
)
def test_a_url_that_cannot_be_one_is_refused(keys, complaint):
    with pytest.raises(ValueError, match=complaint):
        servers.of(configured(reward_fn={"shapes": 1.0}, **keys))


def scorer(url: str, masks: bool, timeout_s: float = 1.0, weight: float = 1.0) -> Scorer:
    where = Servers({"mean": [url]}, timeout_s)
    weights = {"mean": weight, "jpeg_incompressibility": 1.0}
    return Scorer(weights, {}, where=where, masks=masks)


def test_a_failure_stops_or_masks_as_configured(caplog):
    url = f"http://127.0.0.1:{serving.free_port()}"
    stops, masks = scorer(url, False), scorer(url, True)
    monitors = scorer(url, True, weight=0.0)
    batch = (pictures(3, side=16), *blank(3))
    with pytest.raises(RuntimeError, match=f"reward 'mean' failed: {url}: no scores"):
        stops.score(*batch)
    with caplog.at_level(logging.WARNING):
        scores = masks.score(*batch)
    assert "reward 'mean' failed" in caplog.text and "rows are masked" in caplog.text
    assert np.isnan(scores["mean"]).all() and np.isnan(scores["avg"]).all()
    assert np.isfinite(scores["jpeg_incompressibility"]).all()
    assert np.isfinite(monitors.score(*batch)["avg"]).all()  # its weight is 0
    for each in (stops, masks, monitors):
        each.close()


def test_masking_takes_only_the_rows_that_failed():
    with serve(picky) as server:
        masks = scorer(server.url, True, timeout_s=5)
        scores = masks.score(pictures(3, side=16), [""] * 3, [{"n": 1}, {}, {"n": 2}])
        np.testing.assert_array_equal(scores["mean"], [1, np.nan, 2])
        assert np.isnan(scores["avg"]).tolist() == [False, True, False]
        masks.close()


def test_nothing_is_left_behind():
    before = threading.active_count()
    for _ in range(5):
        with serve(mean) as server, client(server.url) as reward:
            call(reward)
    time.sleep(0.3)
    assert threading.active_count() <= before + 1
