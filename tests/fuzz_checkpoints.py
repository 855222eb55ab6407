"""Damaged and forged checkpoints: resumed from bit for bit as they stand, or refused untouched.

    python tests/fuzz_checkpoints.py --count 1000 --seed 0

Prints what came of them; exit status 1 if anything else did. A forged one has digests that fit.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

import fuzzing
import running
import torch
from damaged_checkpoints import COUNTERS, DAMAGES, HONEST, MOMENTS, MUST, STATE, Case, W
from fuzzing import EQUAL, REFUSED
from safetensors.torch import load_file

from flow_grpo.launch import provenance, space
from flow_grpo.training import checkpoint, folders
from flow_grpo.training.run import Run
from flow_grpo.training.tracking import Tracker


class Checkpoints:
    """A fuzzer, of runs that are trained for it once."""

    def __init__(self, folder: Path):
        files = running.make_files(folder / "files")
        more = {"train__ema": True, "num_epochs": 2, "save_freq": 1, "logdir": folder}
        kinds = {
            "foreign": {"seed": 1} | running.lora(files),
            "lora": running.lora(files),
            "full": {},
        }
        self.runs = {
            name: running.train(running.arguments(files, run_name=name, **keys, **more))
            for name, keys in kinds.items()
        }
        self.foreign = self.runs.pop("foreign").folder / "checkpoints"
        self.folders = {name: run.folder for name, run in self.runs.items()}
        self.work = folder / "work"

    def __call__(self, draw: random.Random) -> str:
        shutil.rmtree(self.work, ignore_errors=True)
        name = draw.choice(list(self.runs))
        run, own = self.runs[name], self.work / "run"
        shutil.copytree(self.folders[name], own)
        chosen, other = draw.sample(("checkpoint-2", "checkpoint-4"), 2)
        folder = own / "checkpoints" / chosen
        if draw.random() < 0.3:
            shutil.move(folder, self.work)
            folder = self.work / chosen
        foreign, mark = self.foreign / chosen, self.work / "executed"
        case = Case(draw, folder, own / "checkpoints" / other, foreign, mark)
        honest = truth(folder)
        damage = DAMAGES[draw.number % len(DAMAGES)]
        expected = damage(case)
        try:
            return judge(run, own, case, damage in HONEST and honest, expected)
        except BaseException as error:
            error.add_note(f"{name}, {damage.__name__}, {folder}")
            raise


def judge(run: Run, own: Path, case: Case, honest: dict | None, expected: str) -> str:
    """honest: what must be read, if anything is; None: what stands in the files."""
    elsewhere(run)
    run.folder, run.tracker = own, Tracker(run.ranks, own)
    before, disk = held(run), tree(own)
    try:
        resume(run, case.folder)
    except ValueError as error:
        said = str(error)
        assert str(case.folder) in said, f"names no file: {said}"
        assert "Resume" in said or "resume" in said, f"no remedy: {said}"
        assert same(held(run), before), f"refused ({said}), and changed what is held"
        assert tree(own) == disk, f"refused ({said}), and changed the disk"
        return REFUSED
    finally:
        assert not case.mark.exists(), "a payload was executed"
    assert expected != MUST, "read, though it must be refused"
    assert same(held(run), honest or truth(case.folder)), "other weights, moments or counters"
    return EQUAL


def resume(run: Run, folder: Path) -> None:
    """Do what launch.entry and launch.build do with config.resume_from."""
    config = run.config.copy_and_resolve_references()
    config.resume_from = str(folder)
    found = folders.resume_point(config, run.identity)
    provenance.differences(config, run.plan, found)
    space.check(config, (), run.folder, found)
    checkpoint.load(run, found)


def elsewhere(run: Run) -> None:
    """Let a run hold what no checkpoint has."""
    masters, moments, scale = run.engine.get_state()
    run.engine.set_state(
        {name: torch.full_like(value, 0.125) for name, value in masters.items()},
        {n: {k: torch.full_like(v, 9) for k, v in each.items()} for n, each in moments.items()},
        scale,
    )
    copies = run.snapshots.state_dict()
    run.snapshots.load_state_dict({n: torch.full_like(v, 0.25) for n, v in copies.items()})
    run.epoch, run.updater.num_updates, run.updater.num_skipped = 77, 78, 79


def held(run: Run) -> dict:
    """Copy all that a resume sets: {name: tensor or number}."""
    masters, moments, _ = run.engine.get_state()
    found = {f"{W}/policy/{name}": value.clone() for name, value in masters.items()}
    found |= {f"{W}/{name}": value.clone() for name, value in run.snapshots.state_dict().items()}
    found |= {
        f"{MOMENTS}/{n}/{k}": v.clone() for n, each in moments.items() for k, v in each.items()
    }
    counters = (run.epoch, run.updater.num_updates, run.updater.num_skipped)
    return found | dict(zip(COUNTERS, counters, strict=False))


def truth(folder: Path) -> dict:
    """Read what a checkpoint's files say, plainly."""
    state = json.loads((folder / STATE).read_text())
    held = {file: load_file(folder / file) for file in (W, MOMENTS)}
    # A name without / is of no weight: what else a caller keeps there.
    found = {f"{file}/{n}": v for file in held for n, v in held[file].items() if "/" in n}
    return found | {key: state[key] for key in COUNTERS[:3]}


def same(one: dict, other: dict) -> bool:
    def equal(a, b) -> bool:
        if isinstance(a, torch.Tensor):
            return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
        return a == b

    return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)


def tree(folder: Path) -> dict[str, bytes | str]:
    """Read all that lies below a folder."""
    found = {}
    for path in folder.rglob("*"):
        regular = path.is_file() and not path.is_symlink()
        found[str(path)] = path.read_bytes() if regular else oct(path.lstat().st_mode)
    return found


if __name__ == "__main__":
    sys.exit(fuzzing.main("checkpoints", Checkpoints, sys.argv))
