"""Whole runs of engines that cut the module's weights, on two ranks, against one plain process."""

from __future__ import annotations

import os
from pathlib import Path

import engines
import pytest
import running
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from forking import FSDP, on_ranks, zero
from safetensors.torch import load_file, save_file

from flow_grpo.launch import build
from flow_grpo.training import collect, loop, optimizer

ENGINES = {"zero3": zero(3), "fsdp2": FSDP}
KEYS = {"train__beta": 0.1, "train__ema": True, "train__ema_update_every": 1, "num_epochs": 2}
ONE_UPDATE = {"num_epochs": 1, "train__learning_rate": 1.0, "train__max_grad_norm": 0.0}
ONE_RANK = {"sample__num_batches_per_epoch": 8}  # of two: 4 each
EPS = torch.finfo(torch.float32).eps
pytestmark = pytest.mark.slow


def runs(files: Path, logs: Path, lora: bool) -> None:
    """Make an update of plain SGD, a run of Adam's, and its second half again; on every rank."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    keys = KEYS | (running.lora(files) if lora else {"use_lora": False}) | {"logdir": logs}
    keys |= ONE_RANK if alone else {}
    honest = optimizer.build, collect.weigh
    start = build.choose.start

    def started(*arguments):
        engines.cut_small_weights(engine := start(*arguments))
        engine.ranks.barrier()  # as where a process has one run, whose ranks meet here
        return engine

    build.choose.start = started
    optimizer.build = lambda params, train: torch.optim.SGD(params, lr=train.learning_rate)
    trained(files, logs, "sgd", keys | ONE_UPDATE, accumulate=8 if alone else 4)
    optimizer.build, collect.weigh = honest
    trained(files, logs, "adam", keys, accumulate=4 if alone else 2)
    saved = logs / "adam" / "checkpoints" / "checkpoint-2"
    again = keys | {"resume_from": saved}
    trained(files, logs, "again", again, accumulate=4 if alone else 2)
    collect.weigh = honest[1]
    build.choose.start = start


def trained(files: Path, logs: Path, name: str, keys: dict, accumulate: int) -> None:
    keys = keys | {"train__gradient_accumulation_steps": accumulate}
    run = running.prepare(running.arguments(files, run_name=name, **keys))
    rollouts = logs / f"{name}-rollouts"
    rollouts.mkdir(exist_ok=True)
    running.record_rollouts(rollouts, run.ranks.rank)
    before = run.snapshots.values("policy")
    before = {key: value.clone() for key, value in before.items()}
    loop.train(run)
    after = run.snapshots.values("policy")
    if run.ranks.is_main:
        save_file({k: v.contiguous() for k, v in before.items()}, logs / f"{name}-before")
        save_file({k: v.contiguous() for k, v in after.items()}, logs / f"{name}-after")
    run.evaluator.scorer.close()
    run.tracker.close()
    run.claim.release()


made = {}


@pytest.fixture(params=["lora", "full"])
def plain(request, files, tmp_path_factory):
    if (kind := request.param) not in made:
        made[kind] = tmp_path_factory.mktemp(kind)
        runs(files, made[kind], kind == "lora")
    return kind, made[kind]


@pytest.fixture(params=ENGINES)
def cut(request, plain, files, tmp_path_factory):
    """The logs of one plain process, of two ranks of an engine, and what trained."""
    (kind, one), engine = plain, request.param
    if (engine, kind) not in made:
        made[engine, kind] = tmp_path_factory.mktemp(f"{engine}-{kind}")
        on_ranks(2, ENGINES[engine], runs, files, made[engine, kind], kind == "lora")
    return one, made[engine, kind], kind


def close(one: float, other: float, tolerance: float) -> bool:
    return abs(one - other) <= tolerance * max(abs(one), abs(other), 1e-12)


def test_rollouts_and_rewards_of_the_first_epoch_are_those_of_one_process_bit_for_bit(cut):
    one, two, _ = cut
    whole = load_file(one / "sgd-rollouts" / "0-0")
    halves = [load_file(two / "sgd-rollouts" / f"{rank}-0") for rank in (0, 1)]
    for key, value in whole.items():
        assert torch.equal(torch.cat([half[key] for half in halves]), value), key


def test_an_update_is_that_of_one_process(cut):
    one, two, kind = cut
    (ours,), (theirs,) = (
        [row for row in running.metrics(logs / "sgd") if row["kind"] == "update"]
        for logs in (two, one)
    )
    assert abs(ours["loss"] - theirs["loss"]) <= 1e-6 and (ours["kl"] > 0) == (kind == "lora")
    assert close(ours["grad_norm"], theirs["grad_norm"], 1e-5)
    before, expected = (load_file(one / f"sgd-{when}") for when in ("before", "after"))
    found = load_file(two / "sgd-after")
    assert found.keys() == expected.keys()
    moved = 0
    for key, value in expected.items():
        largest = (value - before[key]).abs().max()
        assert (found[key] - value).abs().max() <= 1e-5 * largest + EPS * value.abs().max(), key
        moved += bool(largest > 0)
    assert moved > len(expected) / 2


def test_a_run_of_adam_s_follows_that_of_one_process(cut):
    one, two, _ = cut
    ours, theirs = (
        [row for row in running.metrics(logs / "adam") if row["kind"] == "update"]
        for logs in (two, one)
    )
    assert len(ours) == len(theirs) == 4
    for row, expected in zip(ours, theirs, strict=True):
        assert abs(row["loss"] - expected["loss"]) <= 1e-3 * abs(expected["loss"]) + 1e-7
        assert close(row["grad_norm"], expected["grad_norm"], 1e-2)
    assert running.gate(two / "adam").keys() == running.gate(one / "adam").keys()
    assert set(running.gate(two / "adam").values()) == {0.0}


def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(cut):
    _, two, kind = cut
    folder = "lora" if kind == "lora" else "transformer"
    parts = [f"{name}-{rank}.safetensors" for name in ("weights", "optimizer") for rank in (0, 1)]
    files = [path.name for path in (two / "adam/checkpoints/checkpoint-4" / folder).glob("*.s*")]
    for name in (*parts, *(f"{folder}/{name}" for name in files)):
        last = f"checkpoints/checkpoint-4/{name}"
        ours, theirs = load_file(two / "again" / last), load_file(two / "adam" / last)
        assert theirs and ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


def test_the_stock_pipeline_loads_what_was_exported(cut, files):
    one, two, kind = cut
    exports = [logs / "sgd/checkpoints/checkpoint-1" for logs in (one, two)]
    pipes = []
    for export in exports:
        if kind == "lora":
            pipes.append(StableDiffusion3Pipeline.from_pretrained(files / "sd3"))
            pipes[-1].load_lora_weights(export / "lora")
        else:
            model = SD3Transformer2DModel.from_pretrained(export / "transformer")
            pipes.append(StableDiffusion3Pipeline.from_pretrained(files / "sd3", transformer=model))
    pictures = [
        pipe(
            "a cat",
            height=32,
            width=32,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
        for pipe in pipes
    ]
    assert abs(pictures[0] - pictures[1]).max() < 1e-4
