"""What ends a run among an epoch's updates: finished epochs are saved, and go on exactly."""

from __future__ import annotations

import signal

import pytest
import running
import torch

from flow_grpo.launch import entry
from flow_grpo.parallel.faults.stop import Stopped
from flow_grpo.training import folders, loop

pytestmark = pytest.mark.usefixtures("fresh_logs")
UPDATE = 4  # counted from 0: the first of the third epoch's two


def settings(files, name: str, **keys) -> list[str]:
    keys = {"num_epochs": 3, "save_freq": 10, "train__ema": True} | keys
    return running.arguments(files, run_name=name, **keys)


def interrupted(files, happens, **keys):
    """Train until something happens after the optimizer's step UPDATE; returns run and error."""
    run = running.prepare(settings(files, "part", **keys))
    honest, taken = run.engine.step, []

    def step(norm):
        honest(norm)
        taken.append(1)
        if len(taken) == UPDATE + 1:
            happens(run)

    run.engine.step = step
    with pytest.raises((RuntimeError, Stopped)) as error:
        loop.train(run)
    run.evaluator.scorer.close()
    assert UPDATE < len(taken) <= UPDATE + 2  # a signal is heard at the next step
    return run, error.value


def fail(run):
    raise RuntimeError("a kernel failed")


def terminate(run):
    run.evaluator.stop._remember(signal.SIGTERM, None)  # this process's handlers are pytest's


@pytest.mark.parametrize(
    "happens, lora",
    [
        (fail, False),
        (terminate, True),
        pytest.param(fail, True, marks=pytest.mark.slow),
        pytest.param(terminate, False, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_ends_among_its_updates_goes_on_as_if_it_had_not(files, happens, lora):
    keys = running.lora(files) if lora else {"train__hold_start": True, "use_lora": False}
    whole = running.train(settings(files, "whole", **keys))
    run, error = interrupted(files, happens, **keys)
    assert error.__notes__ == [f"saved in {run.folder}"]
    assert [path.name for path in folders.checkpoints(run.folder)] == ["checkpoint-4"]
    resumed = running.train(settings(files, "part", resume_from="latest", **keys))
    assert running.metrics(resumed.folder) == running.metrics(whole.folder)
    ours, theirs = running.weights(resumed.folder), running.weights(whole.folder)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("happens", [fail, terminate])
def test_without_the_epochs_start_it_says_what_is_lost(files, happens):
    run, error = interrupted(files, happens, use_lora=False, train__hold_start=False)
    (note,) = error.__notes__
    assert (
        "2 finished epoch(s) could not be saved" in note and "config.train.hold_start=True" in note
    )
    assert folders.checkpoints(run.folder) == []


def test_a_disk_that_is_full_is_said_and_hides_no_error(files, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "save", full)
    run, error = interrupted(files, fail, **running.lora(files))
    (note,) = error.__notes__
    assert str(error) == "a kernel failed" and "No space left on device" in note


def test_an_error_before_anything_is_finished_writes_nothing(files):
    run = running.prepare(settings(files, "gone"))
    run.engine.step = fail
    with pytest.raises(RuntimeError, match="a kernel failed"):
        entry.execute(run)
    assert folders.checkpoints(run.folder) == []


def test_a_signal_is_heard_between_the_points_of_a_long_step(files):
    keys = running.lora(files) | {"train__gradient_accumulation_steps": 4}
    run = running.prepare(settings(files, "long", **keys))
    honest, losses = run.objective.loss, []

    def loss(*arguments):
        losses.append(1)
        if len(losses) == 10:  # the second point of the second epoch's one step of eight
            terminate(run)
        return honest(*arguments)

    run.objective.loss = loss
    with pytest.raises(Stopped) as error:
        loop.train(run)
    run.evaluator.scorer.close()
    assert len(losses) == 10 and error.value.exit_status == 128 + signal.SIGTERM
    assert error.value.__notes__ == [f"saved in {run.folder}"]
    assert [path.name for path in folders.checkpoints(run.folder)] == ["checkpoint-1"]


def test_it_is_heard_between_frozen_predictions(files):
    keys = running.lora(files) | {"train__old_log_prob": "replay"}
    run = running.prepare(settings(files, "frozen", **keys))
    honest, predictor = run.predictor, []

    def counted(rows):
        velocity = honest(rows)

        def predict(point, guidance=None):
            predictor.append(torch.is_grad_enabled())
            if len(predictor) == 4:
                terminate(run)
            return velocity(point, guidance)

        return predict

    run.predictor = counted
    with pytest.raises(Stopped):
        loop.train(run)
    run.evaluator.scorer.close()
    assert predictor == [False] * 4  # two are the gate's


def test_an_end_that_saved_nothing_is_one_message_too(files, monkeypatch, capsys):
    run = running.prepare(settings(files, "bare"))

    def end(run):
        raise Stopped("rank 1 failed: RuntimeError: a kernel failed")

    monkeypatch.setattr(loop, "train", end)
    assert entry.execute(run) == 1
    assert (
        "rank 1 failed: RuntimeError: a kernel failed. To continue it: " in capsys.readouterr().err
    )
