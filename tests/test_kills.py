"""What is left of a run that is killed while it saves: the old state or the new one, complete."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import running

from flow_grpo.training import checkpoint, folders

CHANGES = {f"os.{name}" for name in ("link", "mkdir", "remove", "rename", "rmdir", "truncate")}
FINISHED, KILLED = 0, 7
SOME_BYTES = 100  # less than any file of a checkpoint


def save(run, value: int, *, updated: bool) -> None:
    """Save the state of epoch `value`, which its weights tell. updated: not all were skipped."""
    run.epoch = value
    run.updater.num_updates += updated
    for _, param in running.trained_parameters(run):
        param.data.fill_(value)
    checkpoint.save(run, 0)


def die() -> None:
    os._exit(KILLED)


def die_within_a_file() -> None:
    """Let the system kill this process at the first file that grows beyond some bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (SOME_BYTES, SOME_BYTES))


def at_operation(number: int, happens: Callable[[], None]) -> None:
    """Before the so-manieth change of the disk from now on, counted from 1, something happens."""
    numbers = count(1)

    def changes() -> None:
        if next(numbers) == number:
            happens()

    def audit(event: str, arguments: tuple) -> None:
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in CHANGES:
            changes()

    honest = os.fsync
    os.fsync = lambda descriptor: (changes(), honest(descriptor))
    sys.addaudithook(audit)


def killed_save(run, number: int, happens: Callable[[], None], *, updated: bool) -> int:
    """Save epoch 2 in a process of its own, to which something happens; returns how it ended."""
    child = os.fork()
    if child == 0:  # never to return into pytest
        try:
            at_operation(number, happens)
            save(run, 2, updated=updated)
            os._exit(FINISHED)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def resume(run) -> int:
    """Resume, and return the epoch that weights and state agree on."""
    checkpoint.load(run, folders.resume_point(run.config, run.identity))
    values = {param.unique().item() for _, param in running.trained_parameters(run)}
    assert values == {run.epoch}
    return run.epoch


@pytest.mark.parametrize("happens, killed", [(die, KILLED), (die_within_a_file, -signal.SIGXFSZ)])
@pytest.mark.parametrize(
    "updated",
    [
        pytest.param(True, id="new name", marks=pytest.mark.slow),
        pytest.param(False, id="name of the old one"),
    ],
)
def test_a_kill_before_or_within_any_file_leaves_the_old_or_the_new_checkpoint(
    files, tmp_path, updated, happens, killed
):
    settings = {"logdir": tmp_path, "num_checkpoint_limit": 1, "train__ema": True}
    run = running.prepare(running.arguments(files, run_name="torn", **settings))
    run.config.unlock()
    run.config.resume_from = "latest"
    save(run, 1, updated=True)
    held = Path(shutil.copytree(run.folder, tmp_path / "held"))
    statuses, left = [], []
    while FINISHED not in statuses:
        shutil.rmtree(run.folder)
        shutil.copytree(held, run.folder)
        assert resume(run) == 1
        statuses.append(killed_save(run, len(statuses) + 1, happens, updated=updated))
        left.append(resume(run))
        save(run, 3, updated=True)  # whatever the kill left beside it is no obstacle
        (name,) = (path.name for path in (run.folder / "checkpoints").iterdir())
        assert name == f"checkpoint-{run.updater.num_updates}" and resume(run) == 3
    assert set(statuses[:-1]) == {killed}
    assert left == sorted(left) and set(left) == {1, 2}
