"""A training's state as other ranks, or another engine, wrote it, cut as this rank needs it."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Piece = tuple[int, int, int]  # a part, and which of a weight's elements to take from there


def weights(files: list, parts: list[dict], layout: dict, masters: dict) -> dict[str, Tensor]:
    """Read this rank's elements of the policy's weights, and of each snapshot's.

    files: an open safetensors file of each part. parts: what the index says of them. layout,
    masters: this rank's. Raises ValueError or LookupError where the parts do not hold it all.
    """
    copies = {key.partition("/")[0] for file in files for key in file.keys() if "/" in key}
    found = {}
    for copy in sorted(copies):
        for name, master in masters.items():
            pieces = [
                _elements(files[part], f"{copy}/{name}", start - _start(parts, part, name), length)
                for part, start, length in _pieces(parts, name, layout)
            ]
            found[f"{copy}/{name}"] = torch.cat(pieces).view(master.shape)
    return found


def moments(files: list, parts: list[dict], layout: dict, stepped: dict[str, Tensor]) -> dict:
    """Read Adam's moments of what this rank steps. Padding's are 0, as they always are."""
    found: dict[str, dict] = {name: {} for name in stepped}
    for name in (name for name, where in layout.items() if where["in"]):
        row, offset = layout[name]["in"]
        offset -= layout[name]["held"][0]
        for part, start, length in _pieces(parts, name, layout):
            theirs, at = parts[part]["layout"][name]["in"]
            if not parts[part]["moments"][theirs]:  # never stepped: it had no gradient
                continue
            for key in ("exp_avg", "exp_avg_sq"):
                whole = found[row].setdefault(key, torch.zeros_like(stepped[row], device="cpu"))
                at_part = at + start - _start(parts, part, name)
                values = _elements(files[part], f"{theirs}/{key}", at_part, length)
                whole.view(-1)[offset + start : offset + start + length] = values
            step = files[part].get_tensor(f"{theirs}/step")
            found[row]["step"] = torch.maximum(step, found[row].get("step", step))
    return found


def _start(parts: list[dict], part: int, name: str) -> int:
    return parts[part]["layout"][name]["held"][0]


def _pieces(parts: list[dict], name: str, layout: dict) -> Iterator[Piece]:
    """Say in which parts this rank's elements of a weight lie: part, first of them, how many."""
    at, stop = layout[name]["held"]
    for part in sorted(range(len(parts)), key=lambda part: _start(parts, part, name)):
        first, last = parts[part]["layout"][name]["held"]
        if first <= at < min(last, stop):
            yield part, at, min(last, stop) - at
            at = min(last, stop)
    if at < stop:
        raise ValueError(f"no part has element {at} of {name}")


def _elements(file: Any, key: str, start: int, length: int) -> Tensor:
    """Read a range of a tensor's elements, and little more of the file."""
    tensor = file.get_slice(key)
    shape = tensor.get_shape()
    size = max(1, math.prod(shape[1:]))  # of a row
    first, last = start // size, -(-(start + length) // size)
    rows = tensor[first:last] if shape else file.get_tensor(key)
    found = rows.reshape(-1)[start - first * size :][:length]
    if start < 0 or len(found) != length:
        raise ValueError(f"{key} has the shape {shape}")
    return found
