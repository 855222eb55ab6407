"""A state that some ranks wrote, read by others: cut otherwise, the same numbers."""

import json
from itertools import pairwise

import pytest
import torch

from flow_grpo.parallel import state

SHAPES = {"a": (7, 3), "b": (11,), "c": (2, 5, 4), "d": (1, 2)}
COPIES = ("policy", "old", "ema")
WAYS = ("whole", "ranges", "row")  # of plain and DDP, of FSDP2, of DeepSpeed


def numbers(seed: int, kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"{kind}/{n}": torch.rand(shape, generator=generator) for n, shape in SHAPES.items()}


WEIGHTS = {key: v for seed, copy in enumerate(COPIES) for key, v in numbers(seed, copy).items()}
MOMENTS = numbers(7, "exp_avg") | numbers(8, "exp_avg_sq")


def cuts(way: str, num_ranks: int) -> list[dict]:
    """Of each rank: which elements of each weight it holds, in which tensor and from where on."""
    if way == "whole":
        return [{n: ((0, torch.Size(s).numel()), (n, 0)) for n, s in SHAPES.items()}]
    found = [{} for _ in range(num_ranks)]
    if way == "ranges":
        for name, shape in SHAPES.items():
            rows, size = -(-shape[0] // num_ranks), torch.Size(shape[1:]).numel()
            ends = [min(n * rows, shape[0]) * size for n in range(num_ranks + 1)]
            for rank, held in enumerate(pairwise(ends)):
                found[rank][name] = (held, (name, 0))
        return found
    total = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    piece, before = -(-total // num_ranks), 0  # the last rank's has padding
    for name, shape in SHAPES.items():
        size = torch.Size(shape).numel()
        for rank in range(num_ranks):
            start, stop = (min(max(n * piece - before, 0), size) for n in (rank, rank + 1))
            held = (start, stop) if stop > start else (0, 0)
            found[rank][name] = (held, ("row-0", max(before - rank * piece, 0)))
        before += size
    return found


def part(way: str, cut: dict, num_ranks: int):
    """What a rank of this way holds: layout, weights, stepped tensors, their moments."""
    size = -(-sum(torch.Size(shape).numel() for shape in SHAPES.values()) // num_ranks)
    layout, stepped, moments, weights = {}, {}, {}, {}
    for name, ((start, stop), lies) in cut.items():
        held = stop > start
        layout[name] = {"shape": list(SHAPES[name]), "held": [start, stop]}
        layout[name] |= {"row": way != "whole", "in": list(lies) if held else None}
        if not held:
            continue
        flat = {key: v.flatten()[start:stop] for key, v in (WEIGHTS | MOMENTS).items()}
        shape = SHAPES[name] if way == "whole" else (stop - start,)
        weights |= {f"{c}/{name}": flat[f"{c}/{name}"].view(shape) for c in COPIES}
        row, offset = lies
        if row not in stepped:
            stepped[row] = torch.zeros(size) if way == "row" else torch.zeros(shape)
            zeros = {key: torch.zeros_like(stepped[row]) for key in ("exp_avg", "exp_avg_sq")}
            moments[row] = zeros | {"step": torch.tensor(3.0)}
        for key in ("exp_avg", "exp_avg_sq"):
            moments[row][key].view(-1)[offset : offset + stop - start] = flat[f"{key}/{name}"]
    return layout, weights, stepped, moments


def written(folder, way: str, num_ranks: int) -> list[dict]:
    parts = []
    for rank, cut in enumerate(cuts(way, num_ranks)):
        layout, weights, _, moments = part(way, cut, num_ranks)
        parts.append(state.write(folder, rank, layout, weights, moments))
    (folder / state.INDEX).write_text(json.dumps({"scale": {}, "parts": parts}))
    return parts


def read(folder, way: str, num_ranks: int, rank: int):
    """What a rank reads, and what it should hold."""
    found = cuts(way, num_ranks)
    layout, weights, stepped, moments = part(way, found[rank], num_ranks)
    masters = {name: weights[f"policy/{name}"] for name in SHAPES if f"policy/{name}" in weights}
    return state.read(folder, rank, len(found), layout, masters, stepped)[:2], (weights, moments)


@pytest.mark.parametrize("after", WAYS)
@pytest.mark.parametrize("before", WAYS)
def test_any_ranks_of_any_engine_read_what_others_wrote(tmp_path, before, after):
    for was, now in ((1, 2), (2, 1), (2, 3), (5, 2), (3, 16)):
        written(tmp_path, before, was)
        for rank in range(len(cuts(after, now))):
            (weights, moments), (expected, of_optimizer) = read(tmp_path, after, now, rank)
            assert weights.keys() == expected.keys() and moments.keys() == of_optimizer.keys()
            assert all(torch.equal(weights[key], value) for key, value in expected.items())
            for row, values in of_optimizer.items():
                assert moments[row].keys() == values.keys()
                assert all(torch.equal(moments[row][key], value) for key, value in values.items())


def test_a_weight_that_never_had_a_gradient_has_moments_of_zero_in_a_row_with_others(tmp_path):
    layout, weights, _, moments = part("whole", cuts("whole", 1)[0], 1)
    moments["b"] = {}
    index = {"scale": {}, "parts": [state.write(tmp_path, 0, layout, weights, moments)]}
    (tmp_path / state.INDEX).write_text(json.dumps(index))
    (_, found), (_, expected) = read(tmp_path, "row", 1, 0)
    ((held, (_, offset)),) = [cut["b"] for cut in cuts("row", 1)]
    for key in ("exp_avg", "exp_avg_sq"):
        expected["row-0"][key][offset : offset + held[1]] = 0
        assert torch.equal(found["row-0"][key], expected["row-0"][key])
    assert found["row-0"]["step"] == 3


def test_parts_that_do_not_hold_every_element_are_refused(tmp_path):
    parts = written(tmp_path, "ranges", 2)
    parts[1]["layout"]["a"]["held"][0] += 1
    (tmp_path / state.INDEX).write_text(json.dumps({"scale": {}, "parts": parts}))
    with pytest.raises(ValueError, match="no part has element 12 of a.*another checkpoint"):
        read(tmp_path, "whole", 1, 0)


def test_moments_of_8_bits_are_read_by_the_ranks_that_wrote_them_alone(tmp_path):
    parts = written(tmp_path, "row", 2)
    for each in parts:
        each["moments"]["row-0"]["absmax1"] = each["moments"]["row-0"].pop("exp_avg")
    (tmp_path / state.INDEX).write_text(json.dumps({"scale": {}, "parts": parts}))
    with pytest.raises(ValueError, match="in 2 part.*not absmax1. Resume with as many ranks"):
        read(tmp_path, "row", 3, 0)
