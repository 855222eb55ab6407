"""Write a run's whole state at once or not at all, and read it back bit for bit."""

from __future__ import annotations

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from flow_grpo.training import folders

if TYPE_CHECKING:
    from flow_grpo.training.run import Run

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")


def save(run: Run, metrics_bytes: int) -> Path:
    """Save the state at the start of epoch `run.epoch`. Every rank must call it.

    The folder is written aside and renamed, so that a kill at any moment leaves either a complete
    checkpoint or none. metrics_bytes: how much of metrics.jsonl belongs to the finished epochs.
    """
    final = run.folder / "checkpoints" / f"checkpoint-{run.updater.num_updates}"
    state = (run.epoch, run.updater.num_updates)
    if run.saved != state:
        with run.timer("save"):
            _write(run, final, metrics_bytes)
        run.saved = state
    return final


def _write(run: Run, final: Path, metrics_bytes: int) -> None:
    aside = final.with_name(f".writing-{final.name}")
    if run.accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    run.accelerator.wait_for_everyone()
    _write_state(run, aside)
    export(run, aside, "ema" if run.config.train.ema else "policy")
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        _write_trainer(run, aside, metrics_bytes)
        if final.exists():  # all updates of an epoch were skipped
            os.rename(final, _aside(final))
        os.rename(aside, final)
        _sync(final.parent)
        _prune(run.folder, run.config.num_checkpoint_limit)
    run.accelerator.wait_for_everyone()


def load(run: Run, folder: Path) -> None:
    """Continue from a checkpoint that folders.resume_point() accepted.

    In the run that wrote it, what came after it is forgotten: rows of metrics and checkpoints.
    """
    weights = load_file(folder / "weights.safetensors")
    run.snapshots.load_state_dict(weights)
    if run.updater.uses_deepspeed:
        run.model.load_checkpoint(
            str(folder), tag="deepspeed", load_module_strict=False, load_lr_scheduler_states=False
        )
    else:
        with torch.no_grad():
            for name, param in run.trained_parameters():
                param.copy_(weights[f"policy/{name}"])
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        run.updater.load_optimizer(state["optimizer"])
        if run.accelerator.scaler is not None:
            run.accelerator.scaler.load_state_dict(state["scaler"])
    state = folders.read(folder)
    run.epoch = state["epoch"]
    run.updater.num_updates = state["num_updates"]
    run.updater.num_skipped = state["num_skipped"]
    if folder.resolve().parent.parent == run.folder.resolve():
        run.tracker.cut(state["metrics_bytes"])
        if run.accelerator.is_main_process:
            found = folders.checkpoints(run.folder)
            for later in found[found.index(run.folder / "checkpoints" / folder.name) + 1 :]:
                _remove(later)
    run.saved = (run.epoch, run.updater.num_updates)
    run.accelerator.wait_for_everyone()


def export(run: Run, folder: Path, name: str) -> None:
    """Write snapshot `name` as a stock diffusers pipeline loads it: lora/ or transformer/."""
    main = run.accelerator.is_main_process
    if run.config.use_lora:
        values = run.snapshots.values(name)  # fp32, whatever DeepSpeed made of the weights
        if main:
            run.pipeline.save_lora(values, folder / "lora")
        return
    with run.snapshots.using(name):
        if main:
            run.pipeline.save_transformer(folder / "transformer")


def _write_state(run: Run, folder: Path) -> None:
    held = {name: tensor.contiguous() for name, tensor in run.snapshots.state_dict().items()}
    if run.updater.uses_deepspeed:
        run.model.save_checkpoint(str(folder), tag="deepspeed", exclude_frozen_parameters=True)
    else:
        held |= {f"policy/{n}": p.detach().contiguous() for n, p in run.trained_parameters()}
    if not run.accelerator.is_main_process:
        return
    save_file(held, folder / "weights.safetensors")
    if not run.updater.uses_deepspeed:
        scaler = run.accelerator.scaler
        state = {
            "optimizer": run.updater.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
        }
        torch.save(state, folder / "optimizer.pt")


def _write_trainer(run: Run, folder: Path, metrics_bytes: int) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    state = {
        "epoch": run.epoch,
        "num_updates": run.updater.num_updates,
        "num_skipped": run.updater.num_skipped,
        "metrics_bytes": metrics_bytes,
        "identity": run.identity,
        "versions": {name: version(name) for name in PACKAGES},
        "files": {str(path.relative_to(folder)): path.stat().st_size for path in files},
    }
    for path in files:
        _sync(path)
    (folder / folders.STATE).write_text(json.dumps(state, indent=2) + "\n")
    _sync(folder / folders.STATE)


def _prune(run_folder: Path, limit: int) -> None:
    """Keep the newest `limit` checkpoints (0: all), and nothing half-written."""
    for folder in folders.checkpoints(run_folder)[: -limit or 0] if limit else []:
        _remove(folder)
    for rest in (run_folder / "checkpoints").glob(".writing-*"):
        shutil.rmtree(rest)
    for rest in (run_folder / "checkpoints").glob(".removing-*"):
        shutil.rmtree(rest)


def _remove(folder: Path) -> None:
    """Delete a checkpoint so that a kill midway leaves nothing that looks like one."""
    aside = _aside(folder)
    os.rename(folder, aside)
    shutil.rmtree(aside)


def _aside(folder: Path) -> Path:
    """Where a checkpoint goes to be deleted."""
    aside = folder.with_name(f".removing-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return aside


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
