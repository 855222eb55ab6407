"""Many updates of every engine on two ranks against those of one process, in fp32 and in bf16."""

from __future__ import annotations

import os
from pathlib import Path

import engines
import numpy as np
import pytest
import running
from forking import FSDP, ON_CPU, on_ranks, zero

from flow_grpo.training import loop

ENGINES = {"ddp": ON_CPU, "fsdp2": FSDP} | {f"zero{stage}": zero(stage) for stage in (1, 2, 3)}
ALONE = {"sample__num_batches_per_epoch": 8, "train__gradient_accumulation_steps": 4}
TOGETHER = {"sample__num_batches_per_epoch": 4, "train__gradient_accumulation_steps": 2}
COMMON = {"num_epochs": 1, "train__ema": True, "train__ema_update_every": 1}
RUNS = {  # 20 updates on one rollout; and 2, whose losses are no differences of equal numbers
    "fp32": {"train__beta": 0.1, "train__num_inner_epochs": 10},
    "bf16": {"objective": "nft", "mixed_precision": "bf16"},
}
pytestmark = pytest.mark.slow


def trained(files: Path, logs: Path, name: str) -> None:
    """Train on scores that know no pixel: of these the last bit could decide."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    keys = running.lora(files) | COMMON | RUNS[name] | (ALONE if alone else TOGETHER)
    with engines.small_weights_cut():
        run = running.prepare(running.arguments(files, logdir=logs, run_name=name, **keys))

    def given(scores, held_out):
        first = run.ranks.rank * len(scores["avg"])
        return scores | {"avg": np.sin(1.0 + first + np.arange(len(scores["avg"])))}

    running.watch_scores(run, given)
    loop.train(run)
    run.close()


def both(files: Path, logs: Path) -> None:
    for name in RUNS:
        trained(files, logs, name)


@pytest.fixture(scope="module")
def one(files, tmp_path_factory) -> Path:
    logs = tmp_path_factory.mktemp("one")
    both(files, logs)
    return logs


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_trains_as_one_process_does(name, one, files, tmp_path):
    on_ranks(2, ENGINES[name], both, files, tmp_path)
    for run, count, of_loss, of_norm in (("fp32", 20, 1e-3, 1e-3), ("bf16", 2, 2e-2, 2e-2)):
        ours, theirs = (
            [row for row in running.metrics(logs / run) if row["kind"] == "update"]
            for logs in (tmp_path, one)
        )
        assert len(ours) == len(theirs) == count
        for row, expected in zip(ours, theirs, strict=True):
            said = (run, row["step"], row["loss"], expected["loss"])
            assert row["loss"] == pytest.approx(expected["loss"], rel=of_loss, abs=1e-7), said
            assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=of_norm), said
