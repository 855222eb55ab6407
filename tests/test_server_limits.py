"""What a reward server lets in, and how long it waits for it: counted in bytes, values and rows."""

from __future__ import annotations

import json
import random
import socket
import threading
from contextlib import ExitStack

import numpy as np
import pytest
import serving
from serving import HANG_S, HTTP, ONE, Gate, exact, mean, pictures, post, rows, serve

from flow_grpo.reward_server.__main__ import OPTIONS, main
from flow_grpo.rewards.remote import bounded, wire
from flow_grpo.rewards.remote.bounded import VALUE_BYTES, Malformed, TooLarge

HEAD = f"POST /score HTTP/1.1\r\nhost: x\r\ncontent-type: {wire.CONTENT_TYPE}\r\n"


def port(server) -> int:
    return int(server.url.rpartition(":")[2])


def connect(server, text: str = "") -> socket.socket:
    peer = socket.create_connection(("127.0.0.1", port(server)), timeout=HANG_S)
    peer.sendall(text.encode())
    return peer


def rest(peer: socket.socket) -> bytes:
    """Read until the server ends the connection."""
    found = b""
    try:
        while more := peer.recv(65536):
            found += more
    except ConnectionResetError:
        pass
    return found


def figure(server, name: str) -> float:
    lines = HTTP.get(f"{server.url}/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name))


# Time: what has not come is neither waited for nor counted.


@pytest.mark.parametrize("sent", ["", "x", "x" * 5000])
def test_what_is_announced_and_does_not_come_locks_no_one_out(sent):
    limits = {"queue": 2, "queue_bytes": 500_000, "body_bytes": 400_000, "body_s": HANG_S}
    with serve(mean, **limits) as server, ExitStack() as stack:
        for _ in range(20):
            peer = connect(server, f"{HEAD}content-length: 400000\r\n\r\n{sent}")
            stack.enter_context(peer)
        serving.wait_until(lambda: figure(server, "reward_waiting_bytes") == 20 * len(sent))
        assert post(server.url, exact(ONE)).json()["scores"] == {"mean": [0.0]}
        assert HTTP.get(f"{server.url}/health").json()["waiting"] == 0
        stack.close()
        serving.wait_until(lambda: figure(server, "reward_waiting_bytes") == 0)


@pytest.mark.parametrize("drips", [b"", b"x", b"x" * 100])
def test_a_body_that_does_not_come_in_time_ends(drips):
    """Each piece comes soon after the one before it, and there is no end of them."""
    with serve(mean, body_s=0.15) as server:
        peer, ended = connect(server, f"{HEAD}content-length: 100000000\r\n\r\n"), threading.Event()

        def drip():
            while not ended.wait(0.05):
                try:
                    peer.sendall(drips)
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        assert rest(peer).startswith(b"HTTP/1.1 408 ")
        ended.set()
        thread.join(HANG_S)
        peer.close()
        assert figure(server, "reward_waiting_bytes") == 0


@pytest.mark.parametrize(
    "text", ["", "POST /sc", HEAD, "GET /health HTTP/1.1\r\nhost: x\r\n\r\n", f"{HEAD}\r\n"]
)
def test_a_connection_without_a_whole_head_ends(text):
    """The last two have their answer, and then say nothing."""
    with serve(mean, idle_s=0.15) as server, connect(server, text) as peer:
        rest(peer)  # returns


def test_a_head_that_drips_ends():
    with serve(mean, idle_s=0.15) as server, connect(server, "GET /health HTTP/1.1\r\n") as peer:
        ended = threading.Event()

        def drip():
            while not ended.wait(0.05):
                try:
                    peer.sendall(b"x: y\r\n")
                except OSError:
                    return

        threading.Thread(target=drip, daemon=True).start()
        rest(peer)
        ended.set()


def test_an_answer_that_is_not_read_ends_its_connection():
    many = "GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 3000
    with serve(mean, idle_s=0.15) as server, connect(server) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with pytest.raises(OSError):  # it never reads: in the end there is no one to send to
            while True:
                peer.sendall(many.encode())


def test_connections_beyond_the_most_end_those_without_a_request():
    gate = Gate()
    with serve(gate, most=4) as server, ExitStack() as stack:
        body = exact(ONE)
        busy = connect(server, f"{HEAD}content-length: {len(body)}\r\nconnection: close\r\n\r\n")
        busy.sendall(body)
        stack.enter_context(busy)
        serving.wait_until(lambda: gate.calls == [1])
        idle = [stack.enter_context(connect(server)) for _ in range(8)]
        for peer in idle[:5]:
            assert rest(peer) == b""  # ended
        assert HTTP.get(f"{server.url}/health").json()["waiting"] == 1
        gate.go.set()
        assert rest(busy).startswith(b"HTTP/1.1 200 ")


# Memory: what waits counts as long as it waits, with its metadata.


@pytest.mark.parametrize("kind", ["values", "text", "pixels"])
def test_what_a_request_makes_of_its_bytes_is_counted_until_it_is_scored(kind):
    gate = Gate()
    body, at_least = {
        "values": (exact(ONE | {"metadata": [{"a": [{}] * 5000}]}), 5000 * VALUE_BYTES),
        "text": (exact(ONE | {"prompts": ["x" * 50_000]}), 200_000),  # 4 bytes a character
        "pixels": (exact(ONE, {"image/0": serving.file(300)}), 300 * 300 * 3),
    }[kind]
    assert len(body) < at_least
    with serve(gate, timeout_s=0.2) as server:
        answer = post(server.url, body)
        assert answer.status_code == 504  # no one waits any more, and the request still does
        assert figure(server, "reward_waiting_requests") == 0
        assert at_least <= figure(server, "reward_waiting_bytes") < 20 * at_least
        gate.go.set()
        serving.wait_until(lambda: figure(server, "reward_waiting_bytes") == 0)


@pytest.mark.parametrize("kind", ["values", "text", "pixels"])
def test_what_does_not_fit_beside_others_is_told_to_come_back(kind):
    gate, small = Gate(), exact(ONE)
    large = {
        "values": exact(ONE | {"metadata": [{"a": [{}] * 5000}]}),
        "text": exact(ONE | {"prompts": ["x" * 100_000]}),
        "pixels": exact(ONE, {"image/0": serving.file(600)}),
    }[kind]
    with serve(gate, queue_bytes=400_000, timeout_s=HANG_S) as server:
        held = threading.Thread(target=post, args=(server.url, small))
        held.start()
        serving.wait_until(lambda: gate.calls == [1])
        answer = post(server.url, large)
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        gate.go.set()
        held.join(HANG_S)
        serving.wait_until(lambda: figure(server, "reward_waiting_bytes") == 0)
        assert post(server.url, large).status_code == 200  # alone, it may


@pytest.mark.parametrize("piece", ["{}", "[]", '""', "1.5", '{"a": {}}'])
def test_cheap_to_write_and_dear_to_parse_is_refused_before_it_is_parsed(piece, monkeypatch):
    text = f'{{"prompts": ["x"], "metadata": [{{"a": [{", ".join([piece] * 300_000)}]}}]}}'
    body, parsed = exact(text), []
    real = json.loads
    monkeypatch.setattr(bounded.json, "loads", lambda t, **k: parsed.append(len(t)) or real(t, **k))
    with pytest.raises(TooLarge, match="more than 262144 values"):
        wire.decode(body, 10, 1000)
    assert len(parsed) == 1 and parsed[0] == int.from_bytes(body[:8], "little")  # the head alone


def values(found) -> int:
    """How many values a parsed text has, and keys of objects."""
    inside = found.values() if isinstance(found, dict) else found
    return 1 + (sum(map(values, inside)) if isinstance(found, (dict, list)) else 0)


def test_the_count_is_near_the_number_of_values():
    rng = random.Random(0)

    def drawn(depth: int):
        if depth == 0 or rng.random() < 0.3:
            return rng.choice((1, None, True, 2.5, "", "[[,{\\", '"', '\\"', "\\\\", "é,\u2028["))
        inside = [drawn(depth - 1) for _ in range(rng.randrange(4))]
        keys = ('a"', "b\\", "[", ",")
        return inside if rng.random() < 0.5 else dict(zip(keys, inside, strict=False))

    for _ in range(500):
        tree = drawn(5)
        text = json.dumps(tree, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 1)))
        found, count = bounded.loads(text, 10**6)
        assert found == tree and values(tree) <= count <= 2 * values(tree)


@pytest.mark.parametrize(
    "text",
    ['["\\ud800"]', "[1e999]", "[NaN]", "[-Infinity]", b"\xff", b"[\x001]", "[" * 65, '"', "\\"],
)
def test_json_that_is_none_is_malformed(text):
    with pytest.raises(Malformed):
        bounded.loads(text, 100)
    assert bounded.loads('["\\ud83d\\ude00", "\\\\ud800"]', 100)[0] == ["\U0001f600", "\\ud800"]


@pytest.mark.parametrize("name, kind, default, least, most, meaning", OPTIONS)
def test_an_option_has_a_range(name, kind, default, least, most, meaning, capsys):
    assert least <= default <= most
    for value in (least - 1, most * 2 + 1, "nan", "x"):
        with pytest.raises(SystemExit) as exit:
            main(["--reward=shapes", "--port=1", f"--{name}={value}"])
        assert exit.value.code == 2 and f"--{name}: '{value}'" in capsys.readouterr().err


def test_a_raw_image_is_not_copied():
    body = bytearray(wire.encode(rows(pictures(3))))
    found = wire.decode(body, 10, 10**6)
    assert all(np.shares_memory(image, np.frombuffer(body, np.uint8)) for image in found.images)
