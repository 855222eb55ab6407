"""Where a resumed run starts from, what it continues and what it forgets."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import running
import torch

from flow_grpo.launch import entry
from flow_grpo.report.output import read_metrics
from flow_grpo.training import folders


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder, "update")]


def test_four_epochs_equal_two_and_a_resume_and_two(files):
    settings = running.lora(files) | {
        "num_epochs": 4,
        "train__ema": True,
        "train__ema_update_every": 1,
    }
    whole = running.train(running.arguments(files, run_name="whole", **settings))

    part = running.prepare(running.arguments(files, run_name="part", **settings))
    finished, taken = part.objective.after_epoch, []

    def die_in_the_third(*a):
        taken.append(1)
        if len(taken) == 3:  # after the updates, before the epoch is written
            raise KeyboardInterrupt
        finished(*a)

    part.objective.after_epoch = die_in_the_third
    with pytest.raises(KeyboardInterrupt):
        entry.execute(part)
    resumed = running.train(
        running.arguments(files, run_name="part", resume_from="latest", **settings)
    )
    assert running.metrics(resumed.folder) == running.metrics(whole.folder)
    ours, theirs = running.weights(resumed.folder), running.weights(whole.folder)
    assert set(ours) == set(theirs) and any(key.startswith("ema/") for key in ours)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_resume_unpickles_nothing(files, monkeypatch):
    settings = running.lora(files) | {"run_name": "plain", "train__ema": True}
    run = running.train(running.arguments(files, **settings, num_epochs=1))
    saved = folders.checkpoints(run.folder)[-1]
    kinds = {path.suffix for path in saved.rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json"}

    def refuse(*arguments, **keywords):
        raise AssertionError("a pickle could execute")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads")):
        monkeypatch.setattr(module, name, refuse)
    argv = running.arguments(files, **settings, resume_from="latest", num_epochs=2)
    assert running.train(argv).updater.num_updates == 4


def test_a_resumed_run_may_be_made_longer(files):
    running.train(running.arguments(files, run_name="short"))
    run = running.train(
        running.arguments(files, run_name="short", resume_from="latest", num_epochs=3)
    )
    assert [row["epoch"] for row in read_metrics(run.folder, "epoch")] == [0, 1, 2]
    assert [row["epoch"] for row in read_metrics(run.folder, "eval")] == [0, 3]


def test_a_branch_from_an_old_checkpoint_replaces_what_came_after_it(files):
    old = running.train(running.arguments(files, run_name="branch", num_epochs=3))
    names = [path.name for path in folders.checkpoints(old.folder)]
    assert names == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    first = folders.checkpoints(old.folder)[0]
    before = running.checkpoint_weights(old.folder / "checkpoints" / "checkpoint-6")

    argv = running.arguments(
        files, run_name="branch", num_epochs=3, resume_from=first, train__learning_rate=1e-2
    )
    new = running.prepare(argv)
    assert folders.checkpoints(new.folder) == [first]
    entry.execute(new)
    assert [path.name for path in folders.checkpoints(new.folder)] == names
    assert steps(new.folder) == [1, 2, 3, 4, 5, 6]
    after = running.checkpoint_weights(new.folder / "checkpoints" / "checkpoint-6")
    name, param = next(iter(running.trained_parameters(new)))
    assert after[f"policy/{name}"].equal(param) and not before[f"policy/{name}"].equal(param)


def test_auto_starts_anew_where_a_run_died_before_its_first_checkpoint(files):
    run = running.prepare(running.arguments(files, run_name="early", save_freq=100))
    run.objective.after_epoch = lambda *a: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        entry.execute(run)
    assert steps(run.folder) == [1, 2]
    again = running.train(running.arguments(files, run_name="early", resume_from="auto"))
    assert steps(again.folder) == [1, 2, 3, 4]


def test_settings_of_the_optimizer_come_from_the_config_and_moments_from_the_checkpoint(files):
    running.train(running.arguments(files, run_name="settings"))
    argv = running.arguments(
        files, run_name="settings", resume_from="latest", train__adam_weight_decay=0.5
    )
    optimizer = running.prepare(argv).engine.optimizer
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    assert all(state["step"] == 4 for state in optimizer.state.values())


def test_a_lora_of_another_rank_is_refused(files):
    argv = running.arguments(files, **running.lora(files) | {"train__lora_rank": 16})
    with pytest.raises(ValueError, match="config.train.lora_rank=16, but that .* is 4"):
        running.prepare(argv)


def test_under_another_alpha_a_lora_starts_as_the_same_model(files):
    started = []
    for alpha in (8, 16):
        argv = running.arguments(files, **running.lora(files) | {"train__lora_alpha": alpha})
        started.append(dict(running.trained_parameters(running.prepare(argv))))
    for name, value in started[0].items():
        factor = 2.0 if "lora_B" in name else 1.0
        assert torch.equal(value, factor * started[1][name]), name
