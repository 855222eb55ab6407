"""Write a run's whole state at once or not at all, and read it back bit for bit."""

from __future__ import annotations

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from flow_grpo.cli import redacted
from flow_grpo.training import digests, folders

if TYPE_CHECKING:
    from flow_grpo.training.run import Run

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")


def save(run: Run, metrics_bytes: int) -> Path:
    """Save the state at the start of epoch `run.epoch`. Every rank must call it.

    A kill at any moment leaves a complete checkpoint or none; so does a full disk, which is an
    OSError on all ranks. metrics_bytes: of finished epochs.
    """
    final = run.folder / "checkpoints" / f"checkpoint-{run.updater.num_updates}"
    state, aside = (run.epoch, run.updater.num_updates), final.with_name(f".writing-{final.name}")
    if run.saved != state:
        try:
            with run.timer("save"):
                _write(run, aside, final, metrics_bytes)
        except OSError:
            if run.ranks.is_main:  # it may hold the room that others need
                shutil.rmtree(aside, ignore_errors=True)
            raise
        run.saved = state
    return final


def _write(run: Run, aside: Path, final: Path, metrics_bytes: int) -> None:
    ranks = run.ranks
    ranks.on_main(lambda: _empty(aside))
    files = run.engine.save(aside, run.snapshots.state_dict())
    export(run, aside, "ema" if run.config.train.ema else "policy")
    world = ranks.on_all(lambda: digests.of(aside, files))
    written = {name: digest for each in world for name, digest in each.items()}
    ranks.on_main(lambda: _finish(run, aside, final, metrics_bytes, written))


def _empty(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)


def _finish(
    run: Run, aside: Path, final: Path, metrics_bytes: int, written: dict[str, str]
) -> None:
    _write_trainer(run, aside, metrics_bytes, written)
    if final.exists():  # all updates of an epoch were skipped
        _set_aside(final)
    os.rename(aside, final)
    _sync(final.parent)
    _prune(run.folder, run.config.num_checkpoint_limit)


def load(run: Run, folder: Path) -> None:
    """Continue from a checkpoint; in the run that wrote it, forget what came after it.

    Raises ValueError before anything is changed.
    """
    state = folders.read(folder)  # which may refuse
    run.snapshots.load_state_dict(run.engine.load(folder, run.snapshots.names))
    run.epoch = state["epoch"]
    run.updater.num_updates = state["num_updates"]
    run.updater.num_skipped = state["num_skipped"]
    run.updater.num_skipped_in_a_row = state.get("num_skipped_in_a_row", 0)
    if folders.holds(run.folder, folder):
        run.tracker.cut(state["metrics_bytes"])
        found = folders.checkpoints(run.folder) if run.ranks.is_main else []
        same = [number for number, path in enumerate(found) if path.samefile(folder)]
        for number, path in enumerate(found):  # of a copy by any name only the step is known
            if number > same[0] if same else folders.step(path) > state["num_updates"]:
                _remove(path)
    run.saved = (run.epoch, run.updater.num_updates)
    run.ranks.barrier()


def export(run: Run, folder: Path, name: str) -> None:
    """Write snapshot `name` as a stock diffusers pipeline loads it: lora/ or transformer/."""
    on_main = run.ranks.on_main
    if run.config.use_lora:
        values = run.snapshots.values(name)  # fp32, whatever the module computes in
        on_main(lambda: run.pipeline.save_lora(values, folder / "lora"))
        return
    with run.snapshots.using(name):
        values = run.engine.whole()
        on_main(lambda: run.pipeline.save_transformer(values, folder / "transformer"))


def _write_trainer(run: Run, folder: Path, metrics_bytes: int, written: dict[str, str]) -> None:
    """written: digests of what the engine wrote; the rest is this rank's."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    rest = (path for path in files if str(path.relative_to(folder)) not in written)
    state = {
        "epoch": run.epoch,
        "num_updates": run.updater.num_updates,
        "num_skipped": run.updater.num_skipped,
        "num_skipped_in_a_row": run.updater.num_skipped_in_a_row,
        "metrics_bytes": metrics_bytes,
        "identity": run.identity,
        # This and the next three for a note.
        "config": redacted(json.loads(run.config.to_json_best_effort())),
        "prompts": folders.digest(run.plan.train_prompts),
        "cut": folders.cut(run.plan),
        "versions": {name: version(name) for name in PACKAGES},
        "files": written | digests.of(folder, rest),
    }
    for path in files:
        _sync(path)
    (folder / folders.STATE).write_text(json.dumps(digests.sealed(state), indent=2) + "\n")
    _sync(folder / folders.STATE)


def _prune(run_folder: Path, limit: int) -> None:
    """Keep the newest `limit` checkpoints (0: all), and nothing half-written or replaced."""
    for folder in (run_folder / "checkpoints").glob(f"{folders.REPLACED}*"):
        _remove(folder)
    for folder in folders.checkpoints(run_folder)[: -limit or 0] if limit else []:
        _remove(folder)
    for pattern in (".writing-*", ".removing-*"):
        for rest in (run_folder / "checkpoints").glob(pattern):
            rest.unlink() if rest.is_symlink() else shutil.rmtree(rest)


def _remove(folder: Path) -> None:
    """Delete a checkpoint so that a kill midway leaves nothing that looks like one."""
    aside = folder.with_name(f".removing-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    aside.unlink() if aside.is_symlink() else shutil.rmtree(aside)


def _set_aside(folder: Path) -> None:
    """Give up a checkpoint's name; a run still resumes from it, until the new one is there."""
    aside = folder.with_name(f"{folders.REPLACED}{folder.name}")
    if aside.exists():
        _remove(aside)
    os.rename(folder, aside)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
