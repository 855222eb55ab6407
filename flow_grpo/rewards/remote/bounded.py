"""JSON from elsewhere: its values are counted before it is parsed, so parsing costs what we say."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

import numpy as np

MAX_DEPTH = 64  # of lists and objects in one another
VALUE_BYTES = 256  # of memory that a parsed value takes at most, beside its text
_MARKS = b"[]{},"
_OTHERS = bytes(set(range(256)) - set(_MARKS))
_STEPS = bytes.maketrans(_MARKS, bytes([1, 255, 1, 255, 0]))  # as int8 they add up to the depth


class Malformed(Exception):
    """A body that is not what wire.py says."""


class TooLarge(Exception):
    """A body that asks for more than is allowed."""


def loads(text: str | bytes, max_values: int, max_depth: int = MAX_DEPTH) -> tuple[Any, int]:
    """Parse JSON strictly; return it and how many commas and opening brackets it has, and one.

    That is no less than its values, and no more than twice as many; max_values bounds it.

    Neither NaN nor infinities nor halves of surrogate pairs. Raises Malformed or TooLarge.
    """
    try:
        raw = text.encode() if isinstance(text, str) else bytes(text)
        text = raw.decode()
        num_values = _count(raw, max_values, max_depth)
        found = json.loads(text, parse_constant=_refuse, parse_float=_finite)
        if b"\\ud" in raw or b"\\uD" in raw:
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Malformed(f"no JSON ({str(error)[:200]})") from None
    return found, num_values


def _count(raw: bytes, max_values: int, max_depth: int) -> int:
    """Count what separates values outside of strings; the parser stops where this is misled."""
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    num_values = plain.count(b'"') // 4  # two each of a key and its value
    if num_values <= max_values:
        marks = b"".join(plain.split(b'"')[::2]).translate(None, _OTHERS)
        num_values = 1 + sum(map(marks.count, (b",", b"[", b"{")))
    if num_values > max_values:
        raise TooLarge(f"its JSON has more than {max_values} values")
    steps = np.frombuffer(marks.translate(_STEPS), np.int8)
    if steps.cumsum(dtype=np.int32).max(initial=0) > max_depth:
        raise Malformed(f"its JSON is more than {max_depth} lists and objects deep")
    return num_values


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text[:20])
