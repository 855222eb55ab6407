"""One deadline for all that an answer takes: connecting, its head, 100 Continue, body, parsing."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import hostile_answers
import numpy as np
import pytest
import serving
from serving import HANG_S, client, faulty, pictures, reply, rows

from flow_grpo.rewards.judges import chat
from flow_grpo.rewards.judges.chat import Chat
from flow_grpo.rewards.remote import exchange, health, wire
from flow_grpo.rewards.remote.client import Refused, Unavailable
from flow_grpo.rewards.remote.servers import Servers

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
SAYS = {
    "nothing": (b"", b""),
    "a head": (b"HTTP/1.1 200 OK\r\nx: ", b"y"),
    "heads": (b"HTTP/1.1 200 OK\r\n", b"x: y\r\n"),
    "100 Continue": (CONTINUE, CONTINUE),
    "other interim answers": (b"HTTP/1.1 103 x\r\n\r\n", b"HTTP/1.1 103 x\r\nx: y\r\n\r\n"),
    "a body": (b"HTTP/1.1 200 OK\r\ncontent-length: 60000\r\n\r\n", b" "),
    "chunks": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
}


@contextmanager
def dripping(first: bytes, then: bytes) -> Iterator[str]:
    """A server whose every read succeeds soon, and whose answer never ends."""
    listener, ended = socket.create_server(("127.0.0.1", 0), backlog=16), threading.Event()

    def drip(peer: socket.socket) -> None:
        with peer:
            try:
                peer.sendall(first)
                while not ended.wait(0.02):
                    peer.sendall(then)
            except OSError:
                pass

    def accept() -> None:
        while not ended.is_set():
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=drip, args=(peer,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        ended.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.mark.parametrize("says", SAYS)
def test_a_reward_is_given_up_at_its_deadline(says):
    with dripping(*SAYS[says]) as url, client(url, timeout_s=0.15) as reward:
        with pytest.raises(Unavailable, match="no answer within"):
            reward(rows(pictures(2)))


@pytest.mark.parametrize("says", SAYS)
def test_a_judge_is_given_up_at_its_deadline(says):
    with dripping(*SAYS[says]) as url:
        judge = Chat(url, "m", 3, 0.15)
        with pytest.raises(ConnectionError, match="no complete answer in 0.15 s"):
            judge.ask([(pictures(1), "?")] * 3)
        judge.close()


@pytest.mark.parametrize("says", ["nothing", "heads", "100 Continue", "a body"])
def test_a_server_s_health_is_given_up_at_its_deadline_and_leaves_no_thread(says, monkeypatch):
    monkeypatch.setattr(health, "HEALTH_S", 0.15)
    before = set(threading.enumerate())
    with dripping(*SAYS[says]) as url:
        found = health.ask(Servers({"mean": [url]}), ["mean"])
        assert "does not answer within 0.15 s" in found["mean", url].problem
        ours = [each for each in set(threading.enumerate()) - before if "_ask" in each.name]
        for thread in ours:
            thread.join(HANG_S)
            assert not thread.is_alive()


def most(num_rows: int) -> bytes:
    """Two good scores in as many bytes as an answer for so many rows may have."""
    text = json.dumps({"scores": {"mean": [1.0, 2.0]}, "errors": [None, None]})
    return text.encode() + b" " * (wire.max_answer_bytes(num_rows) - len(text))


def test_an_answer_has_as_many_bytes_as_its_rows_need():
    bodies = [most(2), most(2) + b" "]
    with faulty(lambda handler, n: reply(handler, 200, bodies[n - 1])) as (url, _):
        with client(url) as reward:
            assert reward(rows(pictures(2)))["mean"].tolist() == [1, 2]
            with pytest.raises(Refused, match=f"more than {len(bodies[0])} bytes"):
                reward(rows(pictures(2)))


@pytest.mark.parametrize("status", [200, 422])
def test_sixty_megabytes_of_lists_are_not_even_read(status, monkeypatch):
    """Whatever the status, what is too long for an answer is not parsed."""
    monkeypatch.setattr(exchange, "loads", lambda *_: pytest.fail("it was parsed"))
    answer = hostile_answers.http(b"[" + b"[]," * 20_000_000 + b"[]]", f"{status} x")
    with hostile_answers.serving(iter(lambda: answer, 0)) as url, client(url) as reward:
        with pytest.raises(Refused, match="more than"):
            reward(rows(pictures(2)))
        judge = Chat(url, "m", 1, HANG_S)
        with pytest.raises(ConnectionError, match="more than 1048576 bytes"):
            judge.ask([(pictures(1), "?")])
        judge.close()


DEAR = {
    "lists": b"[" + b"[]," * 20_000 + b"[]]",
    "deep": b"[" * 30_000 + b"]" * 30_000,
    "deep objects": b'{"choices":' * 5000,
    "objects": b'{"scores": {"mean": [' + b"{}," * 15_000 + b"{}]}}",
}


@pytest.mark.parametrize("name", DEAR)
def test_an_answer_of_many_values_or_deep_ones_is_no_answer(name, monkeypatch):
    parsed = []
    for module in (chat, wire):
        real = module.loads
        monkeypatch.setattr(
            module, "loads", lambda *a, real=real, **k: parsed.append(real(*a, **k)) or parsed[-1]
        )
    with faulty(lambda handler, _: reply(handler, 200, DEAR[name])) as (url, _):
        with client(url) as reward, pytest.raises(Refused, match="JSON"):
            reward(rows(pictures(2)))
        judge = Chat(url, "m", 1, HANG_S)
        with pytest.raises(ConnectionError, match="no message in the answer"):
            judge.ask([(pictures(1), "?")])
        judge.close()
    assert not parsed


PAUSES = {"nan": 1, "inf": 30, "-5": 1, "1e9": 30, "x": 1}


@pytest.mark.parametrize("after, paused", PAUSES.items())
def test_a_server_s_word_on_when_to_come_back_is_bounded(after, paused):
    def answer(handler, number):
        if number == 1:
            reply(handler, 429, {}, retry_after=after)
        else:
            reply(handler, 200, {"scores": {"mean": [1.0]}, "errors": [None]})

    clock = serving.Clock()
    with faulty(answer) as (url, _), client(url, clock=clock) as reward:
        assert reward(rows(pictures(1)))["mean"] == np.array([1.0])
    assert len(clock.slept) == 1 and 0 < clock.slept[0] <= paused
