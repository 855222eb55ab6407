"""What can happen to a checkpoint: damage, and forgery by who makes the digests fit.

Each function does it to a Case, and says whether what is left must be refused.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from fuzzing import Payload, flipped, other_than_a_file
from safetensors.torch import load_file, save_file

from flow_grpo.parallel.state import INDEX, OPTIMIZER, WEIGHTS
from flow_grpo.training import digests, folders

STATE = folders.STATE
W, MOMENTS = WEIGHTS.format(0), OPTIMIZER.format(0)
COUNTERS = folders.COUNTERS
NUMBERS = (-1, -(10**30), 10**30, 2**63, 2.5, 1.0, math.nan, math.inf, -math.inf, True, None)
VALUES = (*NUMBERS, "3", "", [], {}, [[]], "\ud800", {"a": {}}, 0, 7)
MUST, MAY = "must be refused", "may be read as it stands"


@dataclass
class Case:
    """A copy of a run's folder, in which a checkpoint is damaged."""

    draw: random.Random
    folder: Path  # the checkpoint
    other: Path  # another step's, of the same run
    foreign: Path  # another run's
    mark: Path  # see Payload

    def names(self) -> list[str]:
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*.*"))

    def name(self) -> str:
        """Draw a file; those that a resume reads come oftener."""
        return self.draw.choice((*self.names(), W, MOMENTS, INDEX, STATE))

    def seal(self, **changed) -> None:
        """Make all digests fit, as whoever wants to harm would."""
        state = json.loads((self.folder / STATE).read_text())
        state.pop(digests.SEAL)
        known = (self.folder / name for name in state["files"])
        state["files"] = digests.of(self.folder, (path for path in known if path.is_file()))
        self.write(state | changed)

    def write(self, state: dict) -> None:
        (self.folder / STATE).write_text(json.dumps(digests.sealed(state)))

    def state(self) -> dict:
        state = json.loads((self.folder / STATE).read_text())
        return {key: value for key, value in state.items() if key != digests.SEAL}


def flip(case: Case) -> str:
    path = case.folder / case.name()
    path.write_bytes(flipped(path.read_bytes(), case.draw))
    return MAY


def cut(case: Case) -> str:
    path = case.folder / case.name()
    os.truncate(path, case.draw.randrange(path.stat().st_size))
    return MAY  # a line feed at the end is no loss


def lengthen(case: Case) -> str:
    with (case.folder / case.name()).open("ab") as file:
        file.write(case.draw.choice((b"\0", b" ", b"}", b"\xff" * 100, b"x" * 10_000)))
    return MAY


def exchange(case: Case) -> str:
    source = case.draw.choice((case.other, case.foreign))
    names = case.draw.sample(case.names(), case.draw.choice((1, 1, 2, 3)))
    for name in names:
        if (source / name).is_file():
            shutil.copy(source / name, case.folder / name)
    return MAY  # some are equal


def permute(case: Case) -> str:
    one, two = (case.folder / name for name in case.draw.sample(case.names(), 2))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second), two.write_bytes(first)
    return MAY if first == second else MUST


def lose(case: Case) -> str:
    (case.folder / case.name()).unlink()
    return MUST


def add(case: Case) -> str:
    names = ("x", "weights-1.safetensors", "pytorch_model.bin", "latest", ".DS_Store", "a/b.json")
    for name in case.draw.sample(names, 2):
        path = case.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(Payload(case.mark)))
    if case.draw.random() < 0.5:
        other_than_a_file(case.folder / "odd", case.draw)
    return MAY


def link(case: Case) -> str:
    name = case.name()
    source = case.draw.choice((case.folder / name, case.other / name))
    aside = case.folder.parent / "elsewhere"
    shutil.copy(source, aside)
    (case.folder / name).unlink()
    (case.folder / name).symlink_to(aside)
    return MAY


def no_file(case: Case) -> str:
    other_than_a_file(case.folder / case.name(), case.draw)
    return MUST


def payload(case: Case) -> str:
    name = case.name()
    path, odd = case.folder / name, Payload(case.mark)
    case.draw.choice((lambda: path.write_bytes(pickle.dumps(odd)), lambda: torch.save(odd, path)))()
    if name != STATE and case.draw.random() < 0.7:
        case.seal()
    return MUST if name in (STATE, W, MOMENTS, INDEX) else MAY


def edit(case: Case) -> str:
    """Change trainer.json by hand."""
    path = case.folder / STATE
    text = path.read_text()
    made = (
        *("", " ", "\0", "null", "[]", "3", "NaN", '"a"', "{}", '{"files": {}}', text + text),
        *("[" * 100_000, "[" * 900 + "]" * 900, '{"a":' * 990 + "1" + "}" * 990, "9" * 5000),
        *(text.replace("{", "{\n", 1), json.dumps(json.loads(text)), "\ufeff" + text),
        text.replace('"epoch": ', '"epoch": 1'),
        text.replace('"epoch": ', '"epoch": 3, "epoch": '),
        text.replace("{", '{"deep": ' + "[" * 980 + "]" * 980 + ",", 1),
        text.replace("{", '{"x": NaN, "y": 1e999, "z": "\\ud800",', 1),
    )
    chosen = case.draw.choice(made)
    path.write_bytes(chosen.encode(case.draw.choice(("utf-8", "utf-8", "utf-16", "utf-8-sig"))))
    return MAY


def forge_counter(case: Case) -> str:
    state, key, value = case.state(), case.draw.choice(COUNTERS), case.draw.choice(VALUES)
    state[key] = value
    if case.draw.random() < 0.3:
        del state[key]
    case.write(state)
    good = type(state.get(key)) is int and 0 <= state[key] < 2**53
    return MAY if good else MUST


def forge_state(case: Case) -> str:
    """Change anything else of trainer.json."""
    state, value = case.state(), case.draw.choice(VALUES)
    key = case.draw.choice((*state, "new"))
    if key in COUNTERS:
        key = "identity"
    inner = state.get(key)
    if isinstance(inner, dict) and case.draw.random() < 0.6:
        odd = ("new", "../checkpoint-4/trainer.json", "/dev/zero", "\0")
        inside = case.draw.choice((*inner, *odd))
        inner[inside] = value
        if case.draw.random() < 0.3:
            del inner[inside]
    else:
        state[key] = value
        if case.draw.random() < 0.3:
            del state[key]
    case.write(state)
    return MAY


def forge_index(case: Case) -> str:
    """Change what index.json says, somewhere."""
    path = case.folder / INDEX
    index = json.loads(path.read_text())
    place, names = index, []
    while isinstance(place, (dict, list)) and place:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        names.append((place, case.draw.choice(keys)))
        place = names[-1][0][names[-1][1]]
    inside, key = case.draw.choice(names)
    if case.draw.random() < 0.3:
        del inside[key]
    else:
        inside[key] = case.draw.choice((*VALUES, {"scale": 1.0}, {"step": [3]}, [5], [2, 2]))
    path.write_text(json.dumps(index))
    case.seal()
    return MAY


def forge_header(case: Case) -> str:
    """Lie in a .safetensors file's header, or in its length."""
    path = case.folder / case.draw.choice((W, MOMENTS))
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    head = data[8 : 8 + length].decode()
    made = (
        *("", "{}", "[]", "null", "{", head[:-9], "[" * 10_000, head.replace("F32", "F64", 1)),
        head.replace("F32", "I32", 1),
        head.replace("F32", "XXX", 1),
        head.replace("data_offsets", "offsets", 1),
        head.replace('"data_offsets":[', '"data_offsets":[4', 1),
        head.replace('"shape":[', '"shape":[18446744073709551615,', 1),
        head.replace('"shape":[', '"shape":[-', 1),
        head.replace("{", '{"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},', 1),
    )
    chosen = case.draw.choice(made).encode()
    size = case.draw.choice((len(chosen),) * 4 + (0, 2**64 - 1, 2**40, len(chosen) + 8))
    path.write_bytes(struct.pack("<Q", size) + chosen + data[8 + length :])
    case.seal()
    return MAY


DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.uint8)
DTYPES = (*DTYPES, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2)


def forge_tensor(case: Case) -> str:
    """Change a tensor's values, name, shape or type."""
    draw, file = case.draw, case.draw.choice((W, MOMENTS))
    tensors = load_file(case.folder / file)
    name = draw.choice(sorted(tensors))
    value, expect = tensors.pop(name), MUST
    kind = draw.choice(("nan", "shape", "dtype", "name", "lost", "flat", "swap", "sign", "value"))
    if kind == "nan":
        value.view(-1)[draw.randrange(value.numel())] = draw.choice((math.nan, math.inf, -math.inf))
    elif kind == "shape":
        value = torch.zeros(draw.choice(([0], [1], [], [3, 5], [*value.shape, 1], [2, 2, 2, 2])))
        expect = MAY
    elif kind == "flat":
        value = value.T.contiguous() if draw.random() < 0.5 else value.flatten()
        expect = MAY
    elif kind == "dtype":
        value = value.to(draw.choice(DTYPES))
    elif kind == "name":
        head, _, tail = name.rpartition("/")
        name = draw.choice((f"{name}.x", f"x/{name}", head, f"{head}/", "", f"reference/{tail}"))
    elif kind == "swap":
        other = draw.choice(sorted(tensors))
        tensors[other], value, expect = value, tensors[other], MAY
    elif kind == "sign":
        value, expect = -value, MAY
    elif kind == "value":
        value, expect = value * draw.choice((0, 3, -0.5, 1e30)), MAY
    if kind != "lost":
        tensors[name] = value
    save_file({key: each.contiguous().clone() for key, each in tensors.items()}, case.folder / file)
    case.seal()
    return expect


HONEST = [flip, cut, lengthen, exchange, permute, lose, add, link, no_file, edit]
FORGED = [payload, forge_counter, forge_state, forge_index, forge_header, forge_tensor]
DAMAGES: list[Callable[[Case], str]] = [*HONEST, *FORGED, forge_tensor, forge_index]
