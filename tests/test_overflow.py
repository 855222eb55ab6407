"""Losses and gradients that overflow: fp16 looks for its loss scale, anything else is a fault."""

from __future__ import annotations

import pytest
import running
import torch

from flow_grpo.launch import entry
from flow_grpo.report.output import read_metrics


def test_a_non_finite_loss_skips_its_update_and_is_counted(files):
    run = running.prepare(running.arguments(files, run_name="nan", num_epochs=2))
    running.break_losses(run, {1})
    entry.execute(run)
    assert run.updater.num_updates == 3 and run.updater.num_skipped == 1
    assert read_metrics(run.folder, "epoch")[-1]["skipped_updates"] == 1
    assert all(torch.isfinite(param).all() for _, param in running.trained_parameters(run))


def test_updates_that_stay_non_finite_stop_the_run(files):
    argv = running.arguments(files, run_name="nans", num_epochs=9, train__max_nonfinite_updates=3)
    run = running.prepare(argv)
    running.break_losses(run, set(range(2, 99)))
    with pytest.raises(FloatingPointError, match="3 updates in a row"):
        entry.execute(run)
    left = [path.name for path in (run.folder / "checkpoints").iterdir()]
    assert left == ["checkpoint-2"]  # of the first epoch, the only one that was finished


def test_an_fp16_overflow_is_no_update_and_lowers_the_scale(files):
    argv = running.arguments(
        files, run_name="fp16", num_epochs=6, train__max_nonfinite_updates=1, train__ema=True
    )
    run = running.prepare(argv)
    # As on a GPU in fp16, with gradients that overflow until the scale is low enough.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    run.engine.scaler = scaler
    _, param = next(iter(running.trained_parameters(run)))
    param.register_hook(lambda g: g * float("inf") if scaler.get_scale() > 2**14 else g)
    entry.execute(run)
    assert (run.updater.num_skipped, run.updater.num_updates) == (2, 10)
    assert scaler.get_scale() == 2**14
    rows = read_metrics(run.folder, "update")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert all(row["grad_norm"] < float("inf") for row in rows)


def test_in_fp16_too_a_non_finite_loss_is_a_fault_and_leaves_the_scale_alone(files):
    argv = running.arguments(files, run_name="fp16nan", train__max_nonfinite_updates=1)
    run = running.prepare(argv)
    run.engine.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    running.break_losses(run, {1})
    with pytest.raises(FloatingPointError, match="1 updates in a row"):
        entry.execute(run)
    assert (run.updater.num_updates, scaler.get_scale()) == (1, 2**8)


def test_an_infinite_gradient_behind_a_finite_loss_is_skipped(files):
    run = running.prepare(running.arguments(files, run_name="inf"))
    _, param = next(iter(running.trained_parameters(run)))
    calls = []

    def overflow(gradient):
        calls.append(1)
        return gradient * float("inf") if len(calls) == 1 else gradient

    param.register_hook(overflow)
    entry.execute(run)
    assert run.updater.num_skipped == 1 and run.updater.num_updates == 3
    assert all(torch.isfinite(p).all() for _, p in running.trained_parameters(run))
