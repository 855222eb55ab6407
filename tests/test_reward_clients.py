"""Clients that are hostile to a reward server: others get their scores, and none is invented."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import serving
from PIL import Image
from safetensors.numpy import save
from serving import (
    HANG_S,
    HTTP,
    ONE,
    Gate,
    client,
    exact,
    file,
    mean,
    picky,
    pictures,
    post,
    rows,
    serve,
)

from flow_grpo.rewards.remote import wire
from flow_grpo.rewards.remote.servers import SomeFailed

pytestmark = pytest.mark.usefixtures("patient")


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


@pytest.mark.slow
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
