"""Answers that nobody should give to a client of a reward server or of a judge, drawn at random."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

GOOD = {"scores": {"mean": [1.5, None]}, "errors": [None, None]}
SAID = {"choices": [{"message": {"role": "assistant", "content": "Final Score: 4"}}]}
JUNK = (
    None,
    True,
    1,
    1.5,
    10**400,
    "1",
    [],
    {},
    [1.5],
    [[1.5], [2]],
    {"a": 1},
    [True, False],
    "x" * 999,
)


def http(body: bytes, status: str = "200 OK", *lines: str) -> bytes:
    head = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *lines, "", ""]
    return "\r\n".join(head).encode() + body


def body(rng: random.Random, right: dict) -> bytes:
    """JSON that is not the right one, most often."""
    text = json.dumps(right)
    pick = rng.randrange(8)
    if pick == 0:
        return text[: rng.randrange(len(text))].encode()
    if pick == 1:
        raw = bytearray(text.encode())
        raw[rng.randrange(len(raw))] = rng.randrange(256)
        return bytes(raw)
    if pick == 2:
        return ("[" * rng.choice((50, 10_000)) + text).encode()
    if pick == 3:
        return ("[" + "[]," * rng.choice((100, 20_000, 400_000)) + "[]]").encode()
    if pick == 4:
        return text.replace("1.5", rng.choice(("NaN", "1e999", "-Infinity", "9" * 5000))).encode()
    if pick == 5:
        return rng.choice((b"", b"<html>", b"\x80\x04.", b"\xff\xfe[\x00", b" " * 10**6, b"null"))
    if pick == 6:
        columns = rng.choice(
            (("avg",), ("step", "kind"), ("a/b",), map(str, range(100)), ("mean",))
        )
        scores = {name: rng.choice(JUNK) for name in columns}
        return json.dumps(
            {"scores": right.get("scores", {}) | scores, "errors": [None, None]}
        ).encode()
    key = rng.choice(list(right))
    return json.dumps(right | {key: rng.choice(JUNK)}).encode()


STATUS = ("301 x", "400 x", "404 x", "409 x", "422 x", "500 x", "503 x", "999 x", "204 x", "101 x")


def answer(rng: random.Random, right: dict) -> bytes:
    """A whole answer, or what should be one."""
    pick = rng.randrange(14)
    good = http(json.dumps(right).encode())
    if pick < 6:
        return http(body(rng, right))
    if pick == 6:
        return http(body(rng, right), rng.choice(STATUS), "location: http://127.0.0.1:9/")
    if pick == 7:
        after = rng.choice(("nan", "inf", "-5", "1e9", "x", "Wed, 21 Oct 2015 07:28:00 GMT"))
        return http(b"{}", "429 x", f"retry-after: {after}")
    if pick == 8:
        return b"HTTP/1.1 100 Continue\r\n\r\n" * rng.choice((1, 1000)) + good
    if pick == 9:
        return good[: rng.randrange(len(good))]
    if pick == 10:
        lines = rng.choice(("x: " + "y" * 10**6, "content-length: 3", "transfer-encoding: chunked"))
        return http(json.dumps(right).encode(), "200 OK", lines)
    if pick == 11:
        return rng.randbytes(rng.randrange(200))
    if pick == 12:
        return http(json.dumps(right).encode(), "200 OK", "content-encoding: gzip")
    return good


@contextmanager
def serving(answers: Iterator[bytes]) -> Iterator[str]:
    """Answer every request with the next of answers and hang up. Yields the URL."""
    listener, ended = socket.create_server(("127.0.0.1", 0), backlog=64), threading.Event()

    def serve() -> None:
        while not ended.is_set():
            with suppress(OSError):
                peer, _ = listener.accept()
                with peer:
                    peer.settimeout(10)
                    read_request(peer)
                    peer.sendall(next(answers))
                    peer.shutdown(socket.SHUT_WR)
                    while peer.recv(65536):
                        pass

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        ended.set()
        listener.close()


def read_request(peer: socket.socket) -> None:
    head = b""
    while b"\r\n\r\n" not in head:
        if not (more := peer.recv(65536)):
            raise OSError
        head += more
    head, _, rest = head.partition(b"\r\n\r\n")
    lines = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    left = int(lines[0].split(b":")[1]) - len(rest) if lines else 0
    while left > 0:
        left -= len(peer.recv(left))
