"""Runs that go on with other ranks, or another engine, than they began with."""

from __future__ import annotations

from pathlib import Path

import engines
import pytest
import running
import torch
from forking import FSDP, ON_CPU, on_ranks, zero
from safetensors.torch import load_file

from flow_grpo.training import collect, loop

ENGINES = {"ddp": ON_CPU, "zero2": zero(2), "zero3": zero(3), "fsdp2": FSDP}
KEYS = {  # whose snapshots are the average, the old policy and the reference
    "objective": "nft",
    "use_lora": False,
    "train__ema": True,
    "train__ema_update_every": 1,
}
BATCHES = {1: (4, 2), 2: (2, 1)}  # calls and accumulation on each of so many ranks
pytestmark = pytest.mark.slow


def trained(files: Path, logs: Path, num_ranks: int, name: str, **keys) -> None:
    """Train on these ranks, with what each drew kept beside the run."""
    batches, accumulated = BATCHES[num_ranks]
    keys |= {"sample__num_batches_per_epoch": batches, "logdir": logs, "run_name": name}
    keys["train__gradient_accumulation_steps"] = accumulated
    honest = collect.weigh
    with engines.small_weights_cut():
        run = running.prepare(running.arguments(files, **KEYS, **keys))
    try:
        (logs / f"{name}-rollouts").mkdir(exist_ok=True)
        running.record_rollouts(logs / f"{name}-rollouts", run.ranks.rank)
        loop.train(run)
    finally:
        collect.weigh = honest
    run.close()


def checkpoint(logs: Path, name: str, updates: int) -> Path:
    return logs / name / "checkpoints" / f"checkpoint-{updates}"


def begun(files: Path, logs: Path, num_ranks: int, other: Path) -> None:
    """Train an epoch and another one, and continue where one process stopped after one."""
    trained(files, logs, num_ranks, "whole", num_epochs=2)
    if other != logs:
        resumed(files, other, logs, num_ranks)


def resumed(files: Path, begun: Path, logs: Path, num_ranks: int) -> None:
    saved = checkpoint(begun, "whole", 2)
    trained(files, logs, num_ranks, "resumed", num_epochs=2, resume_from=saved)


made = {}


@pytest.fixture(params=ENGINES)
def worlds(request, files, tmp_path_factory):
    """The logs of one process and of two ranks: each has a run of its own and the other's end."""
    if "one" not in made:
        made["one"] = tmp_path_factory.mktemp("one")
        begun(files, made["one"], 1, made["one"])
    one, two = made["one"], tmp_path_factory.mktemp("two")
    on_ranks(2, ENGINES[request.param], begun, files, two, 2, one)
    back = tmp_path_factory.mktemp("back")
    resumed(files, two, back, 1)
    return (one, 1, two, 2), (two, 2, back, 1)


def drawn(logs: Path, name: str, num_ranks: int) -> dict[str, torch.Tensor]:
    """What all ranks drew in the second epoch, in the order of its rows."""
    parts = [load_file(logs / f"{name}-rollouts" / f"{rank}-1") for rank in range(num_ranks)]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def updates(logs: Path, name: str) -> list[dict]:
    rows = [row for row in running.metrics(logs / name) if row["kind"] == "update"]
    return [row for row in rows if row["epoch"] == 1]


def test_other_ranks_draw_the_same_and_make_the_same_updates(worlds):
    for before, was, after, now in worlds:
        expected, found = drawn(before, "whole", was), drawn(after, "resumed", now)
        for key, value in expected.items():
            assert torch.equal(found[key], value), key
        pairs = zip(updates(after, "resumed"), updates(before, "whole"), strict=True)
        for ours, theirs in pairs:
            for key in ("loss", "grad_norm"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
        exports = [
            checkpoint(logs, name, 4) / "transformer"
            for logs, name in ((before, "whole"), (after, "resumed"))
        ]
        theirs, ours = (load_file(next(folder.glob("*.safetensors"))) for folder in exports)
        began = load_file(
            next((checkpoint(before, "whole", 2) / "transformer").glob("*.safetensors"))
        )
        for key, value in theirs.items():
            largest = (value - began[key]).abs().max()
            assert (ours[key] - value).abs().max() <= 0.02 * largest + 1e-7, key
