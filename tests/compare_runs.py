"""Compare all numbers of two runs of the same command, to the last bit."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

RENAMED: dict[str, str | None] = {}  # OLD's key, or its part before "/": NEW's; None: not compared
UNCOMPARED = ("seconds/", "memory/", "images_per_second")
GATE, WEIGHTS = "gate", "weights.safetensors"
SHARED_ONLY = (GATE, WEIGHTS)  # each checkout lays them out as it likes; what both have must agree


@dataclass
class Comparison:
    num_rows: int = 0  # of metrics.jsonl, in OLD
    num_values: int = 0  # compared: numbers, and whole tensors
    differing: list[str] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)  # an ordered set

    @property
    def verdict(self) -> str:
        if not self.num_values:
            return "NOTHING COMPARED"
        return "DIFFERS" if self.differing else "equal"


def compare(old: Path, new: Path) -> Comparison:
    """Compare the folders of two runs: metrics, gate, and weights of the last checkpoint.

    A row, a key or a tensor that is gone is a difference; one that is new is noted.
    """
    result = Comparison(num_rows=len(rows(old)))
    old_numbers, new_numbers = numbers(old), numbers(new)
    for place in old_numbers | new_numbers:
        if place not in new_numbers and place not in SHARED_ONLY:
            result.differing.append(f"{place}: gone")
        elif place not in old_numbers:
            result.notes[f"new: {place}"] = None
        elif place in new_numbers:
            _compare_place(place, old_numbers[place], new_numbers[place], result)
    return result


def _compare_place(place: str, old: dict, new: dict, result: Comparison) -> None:
    kind = place.split(",")[0]
    old_of = {renamed(key): key for key in old if renamed(key) is not None}
    for key, name in old_of.items():
        if key in new:
            result.num_values += 1
            if difference := differ(old[name], new[key]):
                result.differing.append(f"{place}: {key} {difference}")
        elif place in SHARED_ONLY:
            result.notes[f"only in OLD: {kind} {key}"] = None
        else:
            result.differing.append(f"{place}: {key} gone")
    for key in new:
        if key not in old_of and key not in old:
            name = re.sub(r"/\d+$", "", key)  # one note for all entries of a list
            result.notes[f"new: {kind} {name}"] = None


def renamed(key: str) -> str | None:
    """Return NEW's name of OLD's key, None if it is not compared."""
    if key.startswith(UNCOMPARED):
        return None
    if key in RENAMED:
        return RENAMED[key]
    head, slash, rest = key.partition("/")
    head = RENAMED.get(head, head)
    return None if head is None else head + slash + rest


def differ(old: object, new: object) -> str | None:
    """Say how two values differ, None if they do not. Two NaN are equal, 0.0 and -0.0 are not."""
    if not isinstance(old, torch.Tensor):
        old_text, new_text = (repr(float(v)) if _is_number(v) else repr(v) for v in (old, new))
        return None if old_text == new_text else f"{old_text} -> {new_text}"
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        kinds = [f"{value.dtype} {tuple(value.shape)}" for value in (old, new)]
        return " -> ".join(kinds)
    old_bits, new_bits = (v.reshape(-1, 1).view(torch.uint8) for v in (old, new))
    wrong = (old_bits != new_bits).any(dim=1).nonzero().flatten()
    if not len(wrong):
        return None
    first = [repr(value.flatten()[wrong[0]].item()) for value in (old, new)]
    return f"{len(wrong)} of {old.numel()} elements, [{wrong[0]}] {' -> '.join(first)}"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def numbers(run: Path) -> dict[str, dict[str, object]]:
    """Return every number of a run's folder: {place: {key: value}}."""
    places = rows(run)
    if (gate := run / "gate.json").exists():
        places[GATE] = dict(flattened(json.loads(gate.read_text())))
    if (run / "checkpoints").exists():
        last = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
        for folder in ("lora", "transformer"):  # as exported
            if (last / folder).exists():
                files = sorted((last / folder).glob("*.safetensors"))
                tensors = {name: value for f in files for name, value in load_file(f).items()}
                places[f"{last.name}/{folder}"] = tensors
        if (last / WEIGHTS).exists():
            places[WEIGHTS] = load_file(last / WEIGHTS)
    return places


def rows(run: Path) -> dict[str, dict[str, object]]:
    """Return the rows of a run's metrics.jsonl, named by kind, epoch and step."""
    named, seen = {}, Counter()
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        place = f"{row['kind']}, epoch {row['epoch']}, step {row['step']}"
        seen[place] += 1
        named[place if seen[place] == 1 else f"{place}, again {seen[place] - 1}"] = row
    return named


def flattened(value: object, prefix: str = "gate") -> Iterator[tuple[str, object]]:
    """Name each value of nested JSON by its path, gate/log_ratio/0."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flattened(inner, f"{prefix}/{key}")
    else:
        yield prefix, value
