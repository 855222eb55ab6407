"""One of two ranks fails: the other hears of it, all meet, and finished epochs are saved."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path

import pytest
import running
import test_processes as processes
import torch
from forking import FSDP, ON_CPU, on_ranks, zero
from waiting import HANG_S, wait_until

from flow_grpo.parallel.faults import regroup
from flow_grpo.parallel.faults.stop import Stopped
from flow_grpo.parallel.plain import Plain
from flow_grpo.training import checkpoint, collect, folders, loop

KEYS = {"num_epochs": 3, "save_freq": 10, "train__ema": True, "train__ema_update_every": 1}
EPOCH = 1  # counted from 0: the one in which a rank fails


def arguments(files: Path, logs: Path, name: str, **more) -> list[str]:
    keys = running.lora(files) | KEYS | more
    return running.arguments(files, logdir=logs, run_name=name, **keys)


def fail(run, where: str) -> None:
    """Let this rank fail in its second epoch."""

    def failing(honest):
        def call(*arguments, **keywords):
            if run.epoch == EPOCH:
                if where == "gone":
                    os._exit(9)
                raise RuntimeError(f"broken in {where}")
            return honest(*arguments, **keywords)

        return call

    if where in ("sample", "gone"):
        run.evaluator.prompt_batch = failing(run.evaluator.prompt_batch)
    elif where == "reward":
        collect.combine = failing(collect.combine)  # behind all ranks' scores
    elif where == "update":
        run.objective.loss = failing(run.objective.loss)
    else:  # after the updates
        run.objective.after_epoch = failing(run.objective.after_epoch)


def broken(files: Path, logs: Path, where: str, rank: int, alone: bool = False) -> None:
    """Train until a rank fails; writes what each rank then raises and says. alone: none meet."""
    if alone := alone or where == "gone":
        regroup.MEETING = timedelta(seconds=1)
    run = running.prepare(arguments(files, logs, "part"))
    mine = run.ranks.rank
    if mine == rank:
        fail(run, where)
    try:
        loop.train(run)
    except Exception as error:
        said = [isinstance(error, Stopped), str(error), *getattr(error, "__notes__", [])]
        (logs / f"{mine}.json").write_text(json.dumps(said))
    run.evaluator.scorer.close()
    run.claim.release()
    if alone:
        os._exit(0)


def said(logs: Path, rank: int) -> list:
    return json.loads((logs / f"{rank}.json").read_text())


@pytest.mark.parametrize(
    "where, rank",
    [
        ("sample", 1),
        pytest.param("sample", 0, marks=pytest.mark.slow),
        pytest.param("reward", 1, marks=pytest.mark.slow),
        pytest.param("reward", 0, marks=pytest.mark.slow),
        ("update", 1),
        pytest.param("update", 0, marks=pytest.mark.slow),
        pytest.param("late", 1, marks=pytest.mark.slow),
    ],
)
def test_what_one_rank_met_is_told_by_all_and_the_finished_epoch_is_saved(
    files, tmp_path, where, rank
):
    on_ranks(2, ON_CPU, broken, files, tmp_path, where, rank)
    saved = f"saved in {tmp_path / 'part'}"
    assert said(tmp_path, rank) == [False, f"broken in {where}", saved]
    words = f"rank {rank} failed: RuntimeError: broken in {where}"
    assert said(tmp_path, 1 - rank) == [True, words, saved]
    (left,) = folders.checkpoints(tmp_path / "part")
    assert left.name == "checkpoint-2" and folders.read(left)["epoch"] == EPOCH


def trained(files: Path, logs: Path, name: str) -> None:
    run = running.prepare(arguments(files, logs, name, resume_from="auto"))
    loop.train(run)
    run.evaluator.scorer.close()
    run.claim.release()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["sample", "update"])
def test_the_run_goes_on_as_if_no_rank_had_failed(files, tmp_path, where):
    on_ranks(2, ON_CPU, broken, files, tmp_path, where, 1)
    for name in ("part", "whole"):
        on_ranks(2, ON_CPU, trained, files, tmp_path, name)
    part, whole = tmp_path / "part", tmp_path / "whole"
    assert running.metrics(part) == running.metrics(whole)
    ours, theirs = running.weights(part), running.weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow
def test_under_a_launcher_it_ends_with_1_and_goes_on(files, tmp_path):
    keys = running.lora(files) | KEYS | {"run_name": "part", "logdir": tmp_path}
    two = processes.launcher("multi_gpu", 2)
    on_cpu = {"env": ON_CPU, "script": "tests/running.py"}
    failing = processes.start(files, *two, **on_cpu | {"env": ON_CPU | {"MODE": "fail"}}, **keys)
    output = processes.finish(failing, status=1)
    assert "rank 1 failed: RuntimeError: out of luck; saved in" in output
    assert output.count("RuntimeError: out of luck") >= 2  # the traceback of that rank
    assert "To continue it: ACCELERATE_USE_CPU=true accelerate launch" in output
    on_cpu["env"] = ON_CPU | {"MODE": ""}
    processes.finish(processes.start(files, *two, **on_cpu, resume_from="latest", **keys))
    assert folders.read(folders.checkpoints(tmp_path / "part")[-1])["epoch"] == 3


@pytest.mark.slow
def test_a_launcher_starts_a_killed_rank_s_run_again_and_it_ends_as_if_none_had_been(
    files, tmp_path
):
    keys = running.lora(files) | KEYS | {"logdir": tmp_path, "save_freq": 1}
    again = ("--max_restarts", "1", "--rdzv_backend", "c10d")
    own_store = ON_CPU | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    for name, mode in (("part", "die once"), ("whole", "")):
        start = {"env": own_store | {"MODE": mode}, "script": "tests/running.py", "run_name": name}
        two = processes.launcher("multi_gpu", 2, *again)
        processes.finish(processes.start(files, *two, **start, resume_from="auto", **keys))
    part, whole = tmp_path / "part", tmp_path / "whole"
    launches = json.loads((part / "launches.json").read_text())
    assert [bool(each["resumed_from"]) for each in launches] == [False, True]
    assert running.metrics(part) == running.metrics(whole)
    ours, theirs = running.weights(part), running.weights(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_rank_that_is_gone_is_waited_for_no_longer_than_allowed(files, tmp_path):
    on_ranks(2, ON_CPU, broken, files, tmp_path, "gone", 1, statuses=[0, 9])
    stopped, _, note = said(tmp_path, 0)
    assert not stopped and note.startswith("1 finished epoch(s) could not be saved")
    assert ": rank 1 (in " in note and note.endswith("did not meet the others")
    assert folders.checkpoints(tmp_path / "part") == []


def fills(files: Path, logs: Path, part: int) -> None:
    """Train until a rank's part of the second checkpoint can't be written."""
    run = running.prepare(arguments(files, logs, "part", save_freq=1))
    honest = checkpoint._empty

    def empty(aside: Path) -> None:
        honest(aside)
        if run.epoch == 2:
            (aside / f"weights-{part}.safetensors").mkdir()

    checkpoint._empty = empty
    try:
        loop.train(run)
    except Stopped as error:
        (logs / f"{run.ranks.rank}.json").write_text(json.dumps([str(error), *error.__notes__]))
    run.evaluator.scorer.close()
    run.claim.release()


@pytest.mark.slow
@pytest.mark.parametrize("engine, part", [(ON_CPU, 0), (FSDP, 1)], ids=["whole", "parts"])
def test_a_rank_s_full_disk_ends_all_and_the_checkpoint_before_is_whole(
    files, tmp_path, engine, part
):
    on_ranks(2, engine, fills, files, tmp_path, part)
    told, note = said(tmp_path, 0)
    assert said(tmp_path, 1) == [told, note] and "no checkpoint could be written" in told
    assert note.startswith("1 finished epoch(s) could not be saved")
    (left,) = (tmp_path / "part" / "checkpoints").iterdir()
    assert folders.read(left)["epoch"] == 1


def waits(folder: Path) -> None:
    """The main rank meets no one, until it is asked to end; the other one lives on meanwhile."""
    regroup.MEETING = timedelta(seconds=HANG_S)
    engine, module, found = Plain("no", cpu=True), torch.nn.Linear(1, 1), None
    engine.wrap(module, torch.optim.SGD(module.parameters()), 0)
    engine.ranks.watch.begin(in_layers=False)
    wait_until(lambda: len(engine.ranks.watch._seen) == 2)
    try:
        if engine.ranks.is_main:
            found = engine.regroup(RuntimeError("mine"), lambda: True)
    finally:
        if engine.ranks.is_main:
            (folder / "found").write_text(json.dumps(found))
    wait_until((folder / "found").exists)
    os._exit(0)


def test_a_rank_that_is_asked_to_end_waits_for_no_other(tmp_path):
    on_ranks(2, ON_CPU, waits, tmp_path)
    found = json.loads((tmp_path / "found").read_text())
    assert found[:2] == [0, "RuntimeError: mine"]
    assert found[2].startswith("rank 1 (in start for") and found[2].endswith("meet the others")


@pytest.mark.slow
def test_deepspeed_s_ranks_meet_too_unless_it_was_among_the_updates(files, tmp_path):
    (tmp_path / "sample").mkdir(), (tmp_path / "update").mkdir()
    on_ranks(2, zero(2), broken, files, tmp_path / "sample", "sample", 1)
    saved = f"saved in {tmp_path / 'sample' / 'part'}"
    assert said(tmp_path / "sample", 1) == [False, "broken in sample", saved]
    words = "rank 1 failed: RuntimeError: broken in "
    assert said(tmp_path / "sample", 0) == [True, f"{words}sample", saved]
    assert len(folders.checkpoints(tmp_path / "sample" / "part")) == 1

    on_ranks(2, zero(2), broken, files, tmp_path / "update", "update", 1, True)
    stopped, told, note = said(tmp_path / "update", 0)
    assert stopped and told == f"{words}update" and "could not be saved" in note
    assert folders.checkpoints(tmp_path / "update" / "part") == []
