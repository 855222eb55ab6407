"""Reward servers that fail or are hostile, and what their client makes of it: no invented score."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import serving
from serving import (
    HANG_S,
    HTTP,
    Clock,
    Gate,
    client,
    faulty,
    pictures,
    post,
    reply,
    rows,
    serve,
)

from flow_grpo.rewards.remote import client as remote
from flow_grpo.rewards.remote import wire
from flow_grpo.rewards.remote.client import Refused, Unavailable

pytestmark = pytest.mark.usefixtures("patient")

GOOD = {"scores": {"mean": [1.0, 2.0]}, "errors": [None, None]}


def call(reward, count=2):
    return reward(rows(pictures(count)))


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
