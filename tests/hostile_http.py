"""Requests that are odd as HTTP already, and the table of all that are drawn."""

from __future__ import annotations

import random
from collections.abc import Callable

from hostile_requests import (
    Case,
    cut,
    deep,
    flipped,
    good,
    many,
    misplaced,
    mistyped,
    numbers,
    pictures,
    repeated,
    sized,
)

from flow_grpo.rewards.remote import wire

TOKEN = "0123456789abcdef0123456789abcdef"
HEAD = ("host: x", f"content-type: {wire.CONTENT_TYPE}", f"authorization: Bearer {TOKEN}")


def unauthorised(rng: random.Random) -> Case:
    given = rng.choice(
        ("", "Bearer", f"Bearer {TOKEN[:-1]}", f"bearer {TOKEN}", TOKEN, "Bearer \u00e9")
    )
    path = rng.choice(("/score", "/health", "/metrics", "/openapi.json", "/docs", "/x", "//score"))
    verb = rng.choice(("GET", "POST", "PUT", "HEAD", "DELETE", "PATCH"))
    body = good(rng).body if verb == "POST" else b""
    lines = [f"{verb} {path} HTTP/1.1", "host: x", f"content-length: {len(body)}"]
    lines += ["connection: close", *([f"authorization: {given}"] if given else [])]
    head = "\r\n".join([*lines, f"content-type: {wire.CONTENT_TYPE}", "", ""])
    return Case(b"", None, (401,), raw=head.encode("latin-1") + body)


LENGTH, CHUNKED = "content-length: ", "transfer-encoding: chunked"
SMUGGLED = (
    *(CHUNKED, f"{CHUNKED}\r\n{LENGTH}5", f"{LENGTH}5\r\n{LENGTH}6", f"{LENGTH}5\r\n {CHUNKED}"),
    *(LENGTH + text for text in ("-1", "+5", "5, 6", "0x5", "9" * 30, "", "1e3", "٣")),
    *("content-length : 5", "transfer-encoding: xchunked", "transfer-encoding: identity"),
    *("x: \x00", "no colon", ": empty", f"x: {'y' * 70_000}"),
    "\r\n".join(f"x{n}: y" for n in range(5000)),
    *("connection: upgrade\r\nupgrade: h2c", "connection: upgrade\r\nupgrade: websocket"),
    f"expect: 100-continue\r\n{LENGTH}9999999999",
)
LINES = (
    *(f"POST /score{rest}" for rest in (" HTTP/1.1", " HTTP/1.0", " HTTP/9.9", "", "\tHTTP/1.1")),
    *("", "\x00" * 9, "PRI * HTTP/2.0", "GET http://x/score HTTP/1.1", "CONNECT x:1 HTTP/1.1"),
    *(f"POST /{'a' * 70_000} HTTP/1.1", "OPTIONS * HTTP/1.1", "POST /%00%ff HTTP/1.1"),
    "\x16\x03\x01\x02\x00\x01\x00",  # TLS
)
BODIES = ("", "5\r\nhello\r\n0\r\n\r\n", "0\r\n\r\nPOST /score HTTP/1.1\r\n", "zz\r\n")


def smuggled(rng: random.Random) -> Case:
    """Odd HTTP. Two requests in one must not become a score that nobody may see."""
    inner = f"POST /score HTTP/1.1\r\nhost: x\r\n{LENGTH}0\r\n\r\n"
    lines = [LINES[0] if rng.random() < 0.6 else rng.choice(LINES), *HEAD]
    lines += rng.sample(SMUGGLED, rng.choice((0, 1, 1, 2)))
    text = "\r\n".join([*lines, "", ""]) + rng.choice((*BODIES, inner, BODIES[2] + inner))
    return Case(b"", raw=text.encode(), then="leaves")


def announced(rng: random.Random) -> Case:
    """More is promised than comes."""
    body = good(rng).body
    length = rng.choice((2**28, 2**28 + 1, 2**40, len(body) + 1))
    lines = [LINES[0], *HEAD, f"{LENGTH}{length}", "", ""]
    sent = "\r\n".join(lines).encode() + body
    keep = rng.choice((3, len(sent) - len(body), len(sent) - 9, len(sent)))
    return Case(b"", None, raw=sent[:keep], then=rng.choice(("waits", "leaves")))


def dribbled(rng: random.Random) -> Case:
    case = good(rng)
    case.then = "dribbles"
    return case


def labelled(rng: random.Random) -> Case:
    case = good(rng)
    case.headers |= rng.choice(
        ({"content-type": "text/plain"}, {"content-type": ""}, {"idempotency-key": "k" * 129})
    )
    case.scores, case.must = None, (400, 415)
    return case


MAKERS: dict[Callable[[random.Random], Case], int] = {  # with how often each is drawn
    good: 10, cut: 8, flipped: 12, deep: 5, many: 2, mistyped: 12, numbers: 8, pictures: 14,
    misplaced: 10, sized: 5, repeated: 6, unauthorised: 6, smuggled: 10, announced: 4, labelled: 3,
    dribbled: 3,
}  # fmt: skip


def draw(rng: random.Random) -> tuple[str, Case]:
    (maker,) = rng.choices(list(MAKERS), list(MAKERS.values()))
    return maker.__name__, maker(rng)
