"""BAGEL on two ranks, by DDP and ZeRO-2, against one process; ZeRO-3 and FSDP2 are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import running
import tiny
import torch
from forking import FSDP, ON_CPU, on_ranks, zero
from safetensors.torch import load_file

from flow_grpo.diffusers_patch.bagel.bagel import Bagel
from flow_grpo.training import loop, optimizer

ENGINES = {"ddp": ON_CPU, "zero2": zero(2)}
KINDS = {
    "lora": {"use_lora": True},
    "full": {"use_lora": False},
    "full-bf16": {"use_lora": False, "mixed_precision": "bf16"},
}
pytestmark = pytest.mark.slow


def runs(files: Path, logs: Path, kind: str) -> None:
    """Make an update of plain SGD, a run of Adam's, and its second half again; on every rank."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    keys = KINDS[kind] | {"logdir": logs, "train__cfg": True, "sample__guidance_scale": 4.0}
    keys |= {"pretrained__model": files / "bagel", "train__beta": 0.1, "max_sequence_length": 48}
    keys |= {"sample__num_batches_per_epoch": 8 if alone else 4}
    honest = optimizer.build
    optimizer.build = lambda params, train: torch.optim.SGD(params, lr=train.learning_rate)
    once = {"num_epochs": 1, "train__learning_rate": 1.0, "train__max_grad_norm": 0.0}
    trained(logs, "sgd", files, keys | once, accumulate=8 if alone else 4)
    optimizer.build = honest
    trained(logs, "adam", files, keys, accumulate=4 if alone else 2)
    saved = logs / "adam" / "checkpoints" / "checkpoint-2"
    trained(logs, "again", files, keys | {"resume_from": saved}, accumulate=4 if alone else 2)


def trained(logs: Path, name: str, files: Path, keys: dict, accumulate: int) -> None:
    keys = keys | {"train__gradient_accumulation_steps": accumulate, "run_name": name}
    run = running.prepare(running.arguments(files, **keys), Bagel)
    loop.train(run)
    run.close()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Return the function that gives the files and one process's logs."""
    files, made = running.make_files(tmp_path_factory.mktemp("files")), {}
    tiny.save("bagel", files / "bagel")

    def of(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            runs(files, made[kind], kind)
        return files, made[kind]

    return of


def updates(logs: Path, name: str) -> list[dict]:
    return [row for row in running.metrics(logs / name) if row["kind"] == "update"]


def close(found: float, expected: float, tolerance: float) -> bool:
    return abs(found - expected) <= tolerance * abs(expected) + 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_train_as_one_process_does_and_resume_to_the_bit(engine, kind, one, tmp_path):
    files, alone = one(kind)
    on_ranks(2, ENGINES[engine], runs, files, tmp_path, kind)
    (ours,), (theirs,) = updates(tmp_path, "sgd"), updates(alone, "sgd")
    assert ours["grad_norm"] > 0
    assert close(ours["grad_norm"], theirs["grad_norm"], 1e-5 if kind != "full-bf16" else 0.05)
    assert len(updates(tmp_path, "adam")) == 4
    if kind != "full-bf16":
        for row, expected in zip(updates(tmp_path, "adam"), updates(alone, "adam"), strict=True):
            assert close(row["grad_norm"], expected["grad_norm"], 1e-2)
    assert set(running.gate(tmp_path / "adam").values()) == {0.0}
    last = tmp_path / "adam" / "checkpoints" / "checkpoint-4"
    parts = [path.relative_to(tmp_path / "adam") for path in last.rglob("*.safetensors")]
    assert any("weights" in path.name for path in parts) and len(parts) >= 3
    for path in parts:
        truth, found = load_file(tmp_path / "adam" / path), load_file(tmp_path / "again" / path)
        assert truth.keys() == found.keys() and all(torch.equal(found[k], truth[k]) for k in truth)


def refused(files: Path, logs: Path) -> None:
    with pytest.raises(ValueError, match="ZeRO-3 and FSDP cut that in parts.*zero2.yaml"):
        keys = {"pretrained__model": files / "bagel", "logdir": logs, "train__cfg": True}
        running.prepare(running.arguments(files, **keys), Bagel)


@pytest.mark.parametrize("engine", [zero(3), FSDP], ids=["zero3", "fsdp2"])
def test_engines_that_cut_weights_are_refused(engine, one, tmp_path):
    on_ranks(2, engine, refused, one("lora")[0], tmp_path)
