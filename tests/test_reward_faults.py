"""Reward servers that fail, and clients that are hostile: no hang, no invented score."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import httpx
import numpy as np
import pytest
import serving
from PIL import Image
from safetensors.numpy import save
from serving import HANG_S, HTTP, Clock, client, faulty, mean, pictures, reply, rows, serve

from config.base import base
from flow_grpo.rewards.combine import Scorer
from flow_grpo.rewards.remote import client as remote
from flow_grpo.rewards.remote import health, servers, wire
from flow_grpo.rewards.remote.client import Refused, Unavailable
from flow_grpo.rewards.remote.servers import Servers, SomeFailed

GOOD = {"scores": {"mean": [1.0, 2.0]}, "errors": [None, None]}
pytestmark = pytest.mark.usefixtures("patient")


def call(reward, count=2):
    return reward(rows(pictures(count)))


def configured(**keys):
    config = base()
    with config.unlocked():
        config.update(keys)
    return config


# What a server may do to a client.


def test_a_dead_server_is_given_up_at_the_deadline_and_then_not_asked_for_a_while():
    url, clock = f"http://127.0.0.1:{serving.free_port()}", Clock()
    start, pauses = clock.now, clock.slept
    with client(url, timeout_s=900, clock=clock) as reward:
        with pytest.raises(Unavailable, match=f"{url}: no scores.*config.reward_timeout=900 s"):
            call(reward)
        assert start + 800 < clock.now < start + 900
        assert len(pauses) > 50 and max(pauses) <= remote.MAX_BACKOFF_S
        assert 0.25 <= pauses[0] <= 0.5 and np.mean(pauses[10:]) > 5  # they grow
        num_pauses = len(pauses)
        clock.now += remote.COOL_DOWN_S - 1
        with pytest.raises(Unavailable, match="not tried again within 30 s"):
            call(reward)
        assert len(pauses) == num_pauses  # it failed at once


def test_a_server_may_be_dead_for_hours_before_it_is_given_up():
    """More than 1,024 failures in a row: what doubles with each must stay a number."""
    url, clock = f"http://127.0.0.1:{serving.free_port()}", Clock()
    with client(url, timeout_s=10_000, clock=clock) as reward:
        with pytest.raises(Unavailable, match="no scores after"):
            call(reward)
    assert len(clock.slept) > 1100


def test_the_circuit_closes_once_the_server_is_healthy_again():
    state, clock = {"up": False}, Clock()

    def answer(handler, number):
        if not state["up"]:
            reply(handler, 503, {"detail": "loading", "reward": "mean"})
        elif handler.command == "GET":
            reply(handler, 200, {"reward": "mean"})
        else:
            reply(handler, 200, GOOD)

    with faulty(answer) as (url, seen), client(url, timeout_s=60, clock=clock) as reward:
        with pytest.raises(Unavailable, match=f"{url}: no scores after"):
            call(reward)
        clock.now += remote.COOL_DOWN_S
        with pytest.raises(Unavailable, match="is not healthy: status 503, loading"):
            call(reward)
        assert seen[-1] == "health"  # nothing was uploaded
        state["up"] = True
        with pytest.raises(Unavailable, match="not tried again"):
            call(reward)
        clock.now += remote.COOL_DOWN_S
        assert call(reward)["mean"].tolist() == [1, 2]
        assert call(reward)["mean"].tolist() == [1, 2]


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_a_busy_server_is_asked_again_under_the_same_id(status):
    def answer(handler, number):
        if number < 3:
            reply(handler, status, {"detail": "later"}, retry_after="7")
        else:
            reply(handler, 200, GOOD)

    clock = Clock()
    with faulty(answer) as (url, seen), client(url, clock=clock) as reward:
        assert call(reward)["mean"].tolist() == [1, 2]
    assert len(seen) == 3 and len({headers["idempotency-key"] for headers in seen}) == 1
    assert clock.slept == [7, 7]  # as it was told


def test_a_scorer_that_fails_is_tried_three_times():
    with faulty(lambda handler, _: reply(handler, 500, {"detail": "CUDA"})) as (url, seen):
        with client(url, clock=Clock()) as reward:
            with pytest.raises(Refused, match=f"{url}: status 500: CUDA"):
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
    with client(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.3) as reward:
        with pytest.raises(Unavailable, match="no answer within"):
            call(reward)
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


class Gate:
    """A scorer that waits until it may go on."""

    def __init__(self):
        self.calls, self.go = [], threading.Event()

    def __call__(self, batch):
        self.calls.append(len(batch))
        assert self.go.wait(HANG_S)
        return mean(batch)


def test_a_slow_scorer_is_found_again_by_a_retry():
    gate = Gate()

    class Patient(Clock):
        async def sleep(self, seconds):  # after the first attempt
            self.now -= HANG_S
            gate.go.set()

    with serve(gate) as server, client(server.url, timeout_s=2, clock=Patient()) as reward:
        assert call(reward)["mean"].shape == (2,)  # the first attempt ended after a second
    assert gate.calls == [2]


def test_a_slower_scorer_is_given_up_and_was_asked_once():
    gate = Gate()
    with serve(gate) as server, client(server.url, timeout_s=2, clock=Clock()) as reward:
        with pytest.raises(Unavailable, match="no scores after .*no answer within"):
            call(reward)
        gate.go.set()
    assert gate.calls in ([], [2])  # on a machine that is busy, not even that


def test_a_request_that_takes_too_long_is_answered():
    gate = Gate()
    with serve(gate, timeout_s=0.3) as server:
        answer = post(server.url, wire.encode(rows(pictures(1))))
        assert answer.status_code == 504 and "no scores within 0.3 s" in answer.json()["detail"]
        gate.go.set()


def test_a_stuck_scorer_makes_the_server_say_so():
    gate, clock, body = Gate(), Clock(), wire.encode(rows(pictures(1)))
    with (
        serve(gate, timeout_s=HANG_S, clock=clock) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(post, server.url, body)
        serving.wait_until(lambda: gate.calls == [1])
        clock.now += HANG_S
        assert HTTP.get(f"{server.url}/health").status_code == 200
        clock.now += 1
        health = HTTP.get(f"{server.url}/health")
        assert health.status_code == 503 and "stuck" in health.json()["detail"]
        assert post(server.url, body).status_code == 503  # nothing piles up
        gate.go.set()
        assert first.result(HANG_S).status_code == 200
        serving.wait_until(lambda: HTTP.get(f"{server.url}/health").status_code == 200)
        assert post(server.url, body).status_code == 200


# What a client may do to a server.


def picky(batch):
    """Refuses a row whose metadata has no "n"."""
    return {"mean": np.array([float(row["n"]) for row in batch.metadata])}


def test_a_row_that_cannot_be_scored_has_an_error_and_the_others_their_scores():
    metadata = [{"n": 3}, {}, {"n": [1]}, {"n": 5}]
    with serve(picky) as server, client(server.url) as reward:
        with pytest.raises(SomeFailed, match="2 of 4 rows have errors; row 1: KeyError") as error:
            reward(rows(pictures(4), metadata=metadata))
        np.testing.assert_array_equal(error.value.scores["mean"], [3, np.nan, np.nan, 5])
        with pytest.raises(SomeFailed, match="1 of 1 rows have errors") as error:
            reward(rows(pictures(1)))
        assert np.isnan(error.value.scores["mean"]).all()
        good = rows(pictures(1), metadata=[{"n": 2}])
        assert reward(good)["mean"] == [2]  # the circuit stayed closed


def test_one_client_s_bad_rows_do_not_spoil_another_s_call():
    go = threading.Event()

    def late(batch):
        assert go.wait(HANG_S)
        return picky(batch)

    with serve(late) as server, client(server.url) as good, client(server.url) as bad:
        with ThreadPoolExecutor(12) as pool:
            fine = [pool.submit(good, rows(pictures(1), metadata=[{"n": n}])) for n in range(8)]
            wrong = [pool.submit(bad, rows(pictures(1))) for _ in range(4)]
            serving.wait_for_requests(server, 12)
            go.set()
            assert [future.result(HANG_S)["mean"][0] for future in fine] == list(range(8))
            assert all(isinstance(future.exception(HANG_S), SomeFailed) for future in wrong)


def test_an_unreadable_image_is_its_row_s_error_alone():
    """What has one dimension is a JPEG file, and nothing else that PIL could read."""
    sent = {
        "image/0": np.frombuffer(b"\xff\xd8 garbage", np.uint8),
        "image/1": np.zeros(0, np.uint8),
        "image/2": file(3, "PNG"),
        "image/3/0": file(2),  # two frames of different sizes
        "image/3/1": file(3),
        "image/4": file(4).astype(np.float32),
        "image/5": file(4),
    }
    metadata = {"prompts": [""] * 6, "metadata": [{}] * 6, "group": None}
    with serve(mean) as server:
        answer = post(server.url, exact(metadata, sent)).json()
    assert [error is None for error in answer["errors"]] == [False] * 5 + [True]
    assert answer["scores"]["mean"] == [None] * 5 + [0.0]


def file(side: int, kind: str = "JPEG", mode: str = "RGB") -> np.ndarray:
    """A black image's file as a tensor."""
    written = BytesIO()
    Image.new(mode, (side, side)).save(written, kind)
    return np.frombuffer(written.getvalue(), np.uint8)


def post(url: str, body: bytes, kind: str = wire.CONTENT_TYPE, **headers) -> httpx.Response:
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
        "more rows than images": {"prompts": ["", ""], "metadata": [{}, {}]},
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
        "an image too many": (exact(ONE, {"image/0": picture, "image/1": picture}), 400),
        "another name": (exact(ONE, {"image/00": picture}), 400),
        "a frame too many": (exact(ONE, {"image/0/0": picture, "image/0/2": picture}), 400),
        "an image and its frames": (exact(ONE, {"image/0": picture, "image/0/0": picture}), 400),
        "videos as frames": (exact(ONE, {"image/0/0": picture[None], "image/0/1": picture}), 422),
        "floats": (exact(ONE, {"image/0": picture.astype(np.float32)}), 422),
        "two channels": (exact(ONE, {"image/0": picture[..., :2]}), 422),
        "an empty image": (exact(ONE, {"image/0": picture[:0]}), 422),
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


def test_an_image_that_unpacks_to_too_many_pixels_is_refused_before_it_is_unpacked(monkeypatch):
    body = exact(ONE, {"image/0": file(9000, mode="L")})
    assert len(body) < 2_000_000
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was unpacked"))
    with serve(mean, pixels=10**7) as server:
        answer = post(server.url, body)
        assert answer.status_code == 413 and "10000000 pixels" in answer.text


def test_what_does_not_fit_is_refused_before_it_is_read():
    with serve(mean, body_bytes=1000) as server:
        assert post(server.url, bytes(1001)).status_code == 413
        assert post(server.url, exact(ONE), "application/octet-stream").status_code == 415
        chunked = HTTP.post(
            f"{server.url}/score", content=iter([b"x"]), headers={"content-type": wire.CONTENT_TYPE}
        )
        assert chunked.status_code == 411
        assert post(server.url, exact(ONE), **{"idempotency-key": "x" * 200}).status_code == 400


def test_a_full_queue_says_when_to_come_back():
    gate = Gate()
    with serve(gate, queue=2) as server, ThreadPoolExecutor(2) as pool:
        held = [pool.submit(post, server.url, exact(ONE)) for _ in range(2)]
        serving.wait_for_requests(server, 2)
        answer = post(server.url, exact(ONE))
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        gate.go.set()
        assert [future.result(HANG_S).status_code for future in held] == [200, 200]
        assert post(server.url, exact(ONE)).status_code == 200


def test_a_thousand_calls_at_once_are_all_answered_with_their_own_scores():
    images = pictures(1000, side=2)
    with serve(mean) as server, client(server.url) as reward:
        with ThreadPoolExecutor(1000) as pool:
            found = list(pool.map(lambda image: reward(rows([image]))["mean"][0], images))
        assert found == [image.mean() for image in images]
        assert server.batcher.num_scored == 1000  # none twice


def test_a_thousand_connections_at_once_get_their_scores_or_are_told_to_wait():
    images, refused, gate = pictures(1000, side=2), [], Gate()

    async def ask(port: int, image: np.ndarray) -> tuple[int, list]:
        body = wire.encode(rows([image]))
        head = f"POST /score HTTP/1.1\r\nhost: x\r\ncontent-type: {wire.CONTENT_TYPE}\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await opened.wait(1000)
        writer.write(head.encode() + body)
        answer = await reader.read()
        writer.close()
        found = json.loads(answer.partition(b"\r\n\r\n")[2])
        if "scores" not in found:
            refused.append(image)
        if len(refused) == 900:  # the others fill the queue
            gate.go.set()
        return int(answer.split()[1]), found.get("scores", {}).get("mean")

    async def ask_all(port: int) -> list:
        return await asyncio.wait_for(asyncio.gather(*(ask(port, x) for x in images)), HANG_S)

    opened = Crowd()
    with serve(gate, queue=100) as server:
        answers = asyncio.run(ask_all(int(server.url.rpartition(":")[2])))
        scored = [(n, scores) for n, (status, scores) in enumerate(answers) if status == 200]
        assert {status for status, _ in answers} == {200, 429} and len(scored) == 100
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


def test_a_server_that_is_down_at_start_is_named(monkeypatch):
    down = f"http://127.0.0.1:{serving.free_port()}"
    with serve(mean, name="pickscore") as server:
        with pytest.raises(ValueError, match=f"'pickscore' at {down} does not answer"):
            health.check(Servers({"pickscore": [server.url, down]}))
        assert health.check(Servers({"pickscore": [server.url]})) == set()
        with pytest.raises(ValueError, match="serves another reward, 'pickscore'. Start it"):
            health.check(Servers({"ocr": [server.url]}))


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 200 OK\r\nx: ", b"HTTP/1.1 200 OK\r\n\r\n{"])
def test_a_server_that_hangs_or_drips_at_start_is_named(says, monkeypatch):
    monkeypatch.setattr(health, "HEALTH_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url, ended = f"http://127.0.0.1:{listener.getsockname()[1]}", threading.Event()

        def drip():
            peer, _ = listener.accept()
            with peer:
                while says and not ended.wait(0.05):  # oftener than a read's patience
                    peer.sendall(says if not sent else b"1")
                    sent.append(1)
                ended.wait(HANG_S)

        sent: list = []
        threading.Thread(target=drip, daemon=True).start()
        with pytest.raises(ValueError, match=f"'mean' at {url} does not answer within 0.2 s"):
            health.check(Servers({"mean": [url]}))
        ended.set()


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"reward": ', b"{}", b" " * 2**16 + b"{}"])
def test_something_else_than_a_reward_server_is_named(body):
    with faulty(lambda handler, _: reply(handler, 200, body)) as (url, _):
        with pytest.raises(ValueError, match=f"{url} is no reward server: GET /health gives"):
            health.check(Servers({"mean": [url]}))


def test_health_is_asked_without_proxy_redirects_or_another_s_password(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("default login me password secret")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{serving.free_port()}")
    headers = []

    def answer(handler, number):
        headers.append(dict(handler.headers))
        if handler.path == "/health":
            reply(handler, 302, b"", location="/elsewhere")
        else:
            reply(handler, 200, {"reward": "mean"})

    with faulty(answer) as (url, seen):
        with pytest.raises(ValueError, match="is no reward server: GET /health gives b''"):
            health.check(Servers({"mean": [url]}))
    assert len(seen) == 1 and "Authorization" not in headers[0]


def test_a_server_says_whether_its_reward_compares():
    with serve(mean, compares=True) as server, serve(mean, name="other") as other:
        assert HTTP.get(f"{server.url}/health").json()["compares"] is True
        asked = Servers({"mean": [server.url], "other": [other.url]})
        assert health.check(asked) == {"mean"}
        assert health.check(asked, ["other"]) == set()


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


def scorer(url: str, masks: bool, timeout_s: float = 0.1, weight: float = 1.0) -> Scorer:
    where = Servers({"mean": [url]}, timeout_s)
    weights = {"mean": weight, "jpeg_incompressibility": 1.0}
    return Scorer(weights, {}, where=where, masks=masks)


def test_a_failure_stops_or_masks_as_configured(caplog):
    url = f"http://127.0.0.1:{serving.free_port()}"
    stops, masks = scorer(url, False), scorer(url, True)
    monitors = scorer(url, True, weight=0.0)
    batch = rows(pictures(3, side=16))
    with pytest.raises(RuntimeError, match=f"reward 'mean' failed: {url}: no scores"):
        stops.score(batch)
    with caplog.at_level(logging.WARNING):
        scores = masks.score(batch)
    assert "reward 'mean' failed" in caplog.text and "rows are masked" in caplog.text
    assert np.isnan(scores["mean"]).all() and np.isnan(scores["avg"]).all()
    assert np.isfinite(scores["jpeg_incompressibility"]).all()
    assert np.isfinite(monitors.score(batch)["avg"]).all()  # its weight is 0
    for each in (stops, masks, monitors):
        each.close()


def test_masking_takes_only_the_rows_that_failed():
    with serve(picky) as server:
        masks = scorer(server.url, True, timeout_s=HANG_S)
        scores = masks.score(rows(pictures(3, side=16), metadata=[{"n": 1}, {}, {"n": 2}]))
        np.testing.assert_array_equal(scores["mean"], [1, np.nan, 2])
        assert np.isnan(scores["avg"]).tolist() == [False, True, False]
        masks.close()


def test_nothing_is_left_behind():
    before = threading.active_count()
    for _ in range(5):
        with serve(mean) as server, client(server.url) as reward:
            call(reward)
    serving.wait_until(lambda: threading.active_count() <= before + 1)
