"""Requests that nobody should send to a reward server, drawn at random, and what may come of them.

Each maker takes a random.Random and returns a Case. The scorer is `mean` below: a score tells of
which image it is.
"""

from __future__ import annotations

import json
import random
import struct
from dataclasses import dataclass, field
from io import BytesIO

import numpy as np
from PIL import Image
from safetensors.numpy import save

Scores = list[float | None]


def mean(batch) -> dict:
    return {"mean": np.array([float(image.mean()) for image in batch.images])}


@dataclass
class Case:
    """What is sent, and what may come back: a refusal always may, unless `must` says no."""

    body: bytes
    scores: Scores | None = None  # those of a 200; None: there must be none
    must: tuple[int, ...] = ()  # the only statuses allowed, where given
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None  # the whole request instead
    then: str = ""  # "waits": the rest never comes; "leaves": it ends; "dribbles": in pieces
    again: Case | None = None  # sent afterwards


def images(rng: random.Random, count: int) -> list[np.ndarray]:
    made = np.random.default_rng(rng.randrange(2**32))
    return [made.integers(0, 256, (rng.randint(1, 9), 7, 3), dtype=np.uint8) for _ in range(count)]


def request(tensors: dict, rows: object) -> bytes:
    return save(tensors, {"rows": rows if isinstance(rows, str) else json.dumps(rows)})


def plain(rng: random.Random) -> tuple[dict, dict, Scores]:
    """Tensors, rows and scores of a good request."""
    found = images(rng, rng.randint(1, 4))
    rows = {
        "prompts": [f"a {rng.random()}, 'b' [c]" for _ in found],
        "metadata": [{"tag": "x", "include": [{"box": [0.5, n]}]} for n in range(len(found))],
        "group": rng.choice((None, [7] * len(found))),
    }  # fmt: skip
    return (
        {f"image/{n}": each for n, each in enumerate(found)},
        rows,
        [float(each.mean()) for each in found],
    )


def good(rng: random.Random) -> Case:
    tensors, rows, scores = plain(rng)
    return Case(request(tensors, rows), scores, (200,))


def cut(rng: random.Random) -> Case:
    body = request(*plain(rng)[:2])
    return Case(body[: rng.randrange(len(body))], None, (400,))


def flipped(rng: random.Random) -> Case:
    """Bytes of the head are changed: the images are the same, if any are read."""
    tensors, rows, scores = plain(rng)
    body = bytearray(request(tensors, rows))
    size = 8 + struct.unpack("<Q", body[:8])[0]
    for _ in range(rng.randint(1, 4)):
        body[rng.randrange(8 if rng.random() < 0.2 else size)] = rng.randrange(256)
    return Case(bytes(body), scores)


def deep(rng: random.Random) -> Case:
    depth = rng.choice((65, 1000, 30_000, 200_000))
    start, end = rng.choice((("[", "]"), ('{"a":', "}"), ('[{"a":[', "]}]")))
    nested = start * depth + "1" + end * rng.choice((depth, 0))
    text = f'{{"prompts": ["x"], "metadata": [{{"a": {nested}}}]}}'
    if rng.random() < 0.3:  # in the head itself
        return Case(headed(nested), None, (400, 413))
    return Case(request(plain(rng)[0], text), None, (400, 413))


def headed(head: str) -> bytes:
    return struct.pack("<Q", len(head)) + head.encode()


def many(rng: random.Random) -> Case:
    """Cheap to write and dear to parse."""
    count = rng.choice((300_000, 700_000))
    piece = rng.choice(("{},", "[],", '"",', "1.5,", "[{}],", '{"a":{}},'))
    many = (piece * count)[:-1]
    keys = ",".join(f'"{n}":1' for n in range(count)) if rng.random() < 0.1 else ""
    text = rng.choice(
        (
            f'{{"prompts": ["x"], "metadata": [{many}]}}',
            f'{{"prompts": [{many}], "metadata": [{{}}]}}',
            f'{{"prompts": ["x"], "metadata": [{{"a": [{many}]}}]}}',
            f'{{"prompts": ["x"], "metadata": [{{{keys}}}]}}' if keys else f"[{many}]",
        )
    )
    if rng.random() < 0.2:
        return Case(headed(text), None, (400, 413))
    return Case(request(plain(rng)[0], text), None, (400, 413))


JUNK = (None, True, 0, -1, 1.5, 10**30, "", "x", "\ud800", [], {}, [[]], [None], {"a": 1}, "é" * 99)


def mistyped(rng: random.Random) -> Case:
    """A node of the rows is something else: of the metadata it may be, as long as it is JSON."""
    tensors, rows, scores = plain(rng)
    junk = rng.choice(JUNK)
    key = rng.choice(("prompts", "metadata", "group", "inner", "all"))
    if key == "all":
        return Case(request(tensors, json.dumps(junk)), None, (400,))
    if key == "inner":
        rows["metadata"][0]["include"] = junk
    elif rng.random() < 0.5 and key != "group":
        rows[key][rng.randrange(len(rows[key]))] = junk
    else:
        rows[key] = junk
    return Case(request(tensors, json.dumps(rows)), scores)


NUMBERS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e400",
    "1" * 400,
    "9" * 5000,
    "0x1",
    "1.",
    "-",
)


def numbers(rng: random.Random) -> Case:
    tensors, rows, scores = plain(rng)
    number = rng.choice(NUMBERS)
    text = json.dumps(rows | {"metadata": [{"x": "?"} for _ in scores]}).replace('"?"', number)
    where = rng.choice(("metadata", "group"))
    if where == "group":
        text = json.dumps(rows | {"group": "?"}).replace('"?"', f"[{number}]")
    fine = number == "1" * 400 and where == "metadata"
    return Case(request(tensors, text), scores if fine else None, (200,) if fine else (400,))


def jpeg(side: int = 8, mode: str = "RGB", kind: str = "JPEG") -> bytes:
    file = BytesIO()
    Image.new(mode, (side, side)).save(file, kind)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A small file that says it has so many pixels."""
    file = bytearray(jpeg())
    place = file.index(b"\xff\xc0") + 5
    file[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(file)


def unreadable(rng: random.Random) -> np.ndarray:
    file = rng.choice(
        (
            jpeg()[: rng.randrange(1, 300)],
            jpeg(kind="PNG"),
            jpeg(kind="GIF"),
            b"\xff\xd8" + rng.randbytes(50),
            bomb(65_000, 65_000),
            bomb(8000, 8000),
            bomb(12_000, 12_000),
            rng.randbytes(200),
        )
    )
    return rng.choice(
        (
            *[np.frombuffer(file, np.uint8)] * 6,
            np.zeros((3, 3, 4), np.uint8),
            np.zeros((2, 2), np.uint8),
            np.zeros((0, 3, 3), np.uint8),
            np.zeros((2, 2, 3), np.float32),
            np.full((2, 2, 3), np.nan),
            np.zeros((2, 2, 3), np.int64),
            np.zeros((1, 1, 1, 2, 3), np.uint8),
        )
    )


def pictures(rng: random.Random) -> Case:
    """Some rows can't be read: these have errors, the others their scores."""
    tensors, rows, scores = plain(rng)
    bad = [n for n in range(len(scores)) if rng.random() < 0.5]
    for n in bad:
        tensors[f"image/{n}"] = unreadable(rng)
        scores[n] = None
    if len(bad) == len(scores):
        return Case(request(tensors, rows), None, (413, 422))
    if rng.random() < 0.2:  # and more of them than there are rows
        tensors[f"image/{len(scores)}"] = unreadable(rng)
        return Case(request(tensors, rows), None, (400,))
    return Case(request(tensors, rows), scores, (200,))


def misplaced(rng: random.Random) -> Case:
    """Tensors whose bytes are not where their shapes say."""
    tensors, rows, scores = plain(rng)
    body = request(tensors, rows)
    size = struct.unpack("<Q", body[:8])[0]
    head = json.loads(body[8 : 8 + size])
    entry = head["image/0"]
    wrong = rng.choice((-1, 0, 1, 7, 2**31, 2**62, 2**64, 10**30, 1.5, None, "0", True))
    place = rng.choice(("data_offsets", "shape"))
    before = json.dumps(entry)
    entry[place][rng.randrange(len(entry[place]))] = wrong
    if rng.random() < 0.2:
        entry["dtype"] = rng.choice(("U9", "F64", "", None, "BOOL", "I8"))
    same = json.dumps(entry) == before
    text = json.dumps(head)
    moved = headed(text) + body[8 + size :]
    return Case(moved, scores, (200,) if same else ())


def sized(rng: random.Random) -> Case:
    body = request(*plain(rng)[:2])
    size = rng.choice((0, 1, 7, len(body), len(body) - 7, 2**24, 2**31, 2**63, 2**64 - 1))
    return Case(struct.pack("<Q", size) + body[8:], None, (400, 413))


def repeated(rng: random.Random) -> Case:
    """A key that comes again: with the same body the same scores, with another none."""
    first, other = good(rng), good(rng)
    first.headers["idempotency-key"] = other.headers["idempotency-key"] = rng.randbytes(8).hex()
    same = rng.random() < 0.5
    other.must, other.scores = (409,), None
    first.again = Case(first.body, first.scores, (200,), first.headers) if same else other
    return first
