"""Run the same commands in two checkouts and compare all numbers that come out, to the last bit.

    python tests/compare_checkouts.py OLD NEW [--runs testbed known] [--epochs 3] [--jobs 2]

For a refactor, which must not change what is computed. OLD and NEW are folders: a worktree of the
commit before, and the one with the change. Pipelines, data and commands are those of the checkout
in which this file lies. What a run wrote is kept in --cache under a digest of its checkout's files,
so a run is made again only where they changed; the cache may be deleted at any time.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import test_known_runs as known
from compare_runs import compare
from tqdm import tqdm

import flow_grpo

ROOT = Path(__file__).resolve().parent.parent
RENAMED_OPTIONS: dict[str, str] = {}  # a config key of OLD's command line: NEW's
TESTBED = {"testbed": "shapes_sd3", "grpo-testbed": "shapes_sd3_grpo"}
DIGESTED = ("config", "dataset", "flow_grpo", "scripts")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
SHOWN = 5  # differing values of a run


class RunFailed(Exception):
    """A run has no numbers to compare; the message says why."""


@dataclass(frozen=True)
class Command:
    name: str  # and the run's name
    script: str
    config: str
    options: dict[str, object]  # without logdir and run_name; NEW's names

    def line(self, logs: Path, names: dict[str, str]) -> list[str]:
        """names: of NEW's options in the checkout that runs it, where they differ."""
        options = {**self.options, "logdir": logs.resolve(), "run_name": self.name}
        keys = [f"--config.{names.get(key, key)}={value}" for key, value in options.items()]
        return [sys.executable, f"scripts/{self.script}", f"--config={self.config}", *keys]


def digest(checkout: Path) -> str:
    """Return a short digest of all files that a run may read."""
    total = hashlib.sha256()
    for folder in DIGESTED:
        for path in sorted((checkout / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                total.update(str(path.relative_to(checkout)).encode() + b"\0")
                total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:12]


def commands(chosen: Sequence[str], epochs: int | None, cache: Path) -> list[Command]:
    """Return what to run: of each group's or run's name, in that order. Writes the tiny models."""
    made = []
    for name in chosen:
        if name in TESTBED:
            options = {"seed": 0, "tracker": "none"} | ({"num_epochs": epochs} if epochs else {})
            config = f"config/testbed.py:{TESTBED[name]}"
            suffix = f"-{epochs}" if epochs else ""
            made.append(Command(TESTBED[name] + suffix, "train_sd3.py", config, options))
        else:
            made += [_known(run, cache) for run in (known.RUNS if name == "known" else [name])]
    return made


def _known(run: str, cache: Path) -> Command:
    if not (cache / "data").exists():
        known.make_data(cache / "data")
    script, family = known.script_of(known.config_of(run).pretrained.model)
    model = known.save_tiny(family, (cache / "models").resolve())
    config, *options = known.arguments(run, model, (cache / "data").resolve(), cache)
    pairs = [option.removeprefix("--config.").split("=", 1) for option in options]
    return Command(
        run.replace(":", "-"), script.name, config.removeprefix("--config="), dict(pairs)
    )


class Checkout:
    """Where runs are made, and kept."""

    def __init__(self, folder: Path, cache: Path, names: dict[str, str], given: dict[str, Path]):
        """names: of its config keys, where they are not NEW's. given: runs that exist already."""
        self.folder, self.names, self.given = folder.resolve(), names, given
        self.digest = digest(folder)
        self.logs = cache / self.digest

    def run(self, command: Command) -> Path:
        """Return the folder of a finished run, made now unless it is there."""
        if command.name in self.given:
            return self.given[command.name]
        folder = self.logs / command.name
        finished, log = (folder.with_name(f"{folder.name}.{end}") for end in ("finished", "log"))
        if finished.exists():
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        self.logs.mkdir(parents=True, exist_ok=True)
        line = command.line(self.logs, self.names)
        environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(self.folder)}
        with open(log, "w") as out:
            done = subprocess.run(line, cwd=self.folder, env=environment, stdout=out, stderr=out)
        if done.returncode:
            raise RunFailed(f"exit status {done.returncode} in {self.folder}, see {log}")
        if digest(self.folder) != self.digest:
            raise RunFailed(f"{self.folder} was changed while it ran")
        finished.touch()
        return folder


def told(command: Command, old: Checkout, new: Checkout) -> tuple[str, bool]:
    """Run a command in both checkouts. Returns lines for the table, and whether all is equal."""
    try:
        result = compare(old.run(command), new.run(command))
    except RunFailed as error:
        return f"FAILED: {error}", False
    counts = f"{result.num_rows:5}  {result.num_values:7}  {len(result.differing):9}"
    below = result.differing[:SHOWN] + list(result.notes)
    return "\n    ".join([f"{counts}  {result.verdict}", *below]), result.verdict == "equal"


def main() -> int:
    arguments = parsed()
    made = commands(arguments.runs, arguments.epochs, arguments.cache)
    old_names = {new: old for old, new in RENAMED_OPTIONS.items()}
    old = Checkout(arguments.old, arguments.cache, old_names, arguments.old_run)
    new = Checkout(arguments.new, arguments.cache, {}, {})
    if unknown := set(arguments.old_run) - {command.name for command in made}:
        raise SystemExit(f"--old-run: {', '.join(sorted(unknown))} is not among the runs")
    width, num_equal = max(len(command.name) for command in made), 0
    print(f"{'run':{width}}  {'rows':>5}  {'values':>7}  {'differing':>9}  verdict")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        ran = pool.map(lambda command: told(command, old, new), made)
        for command, (lines, equal) in zip(made, tqdm(ran, "runs", len(made)), strict=True):
            tqdm.write(f"{command.name:{width}}  {lines}")
            num_equal += equal
    print(f"{num_equal} of {len(made)} runs are equal")
    return 0 if num_equal == len(made) else 1


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    groups = (*TESTBED, "known")
    parser.add_argument(
        "--runs",
        nargs="+",
        default=["all"],
        choices=["all", *groups, *known.RUNS],
        metavar="NAME",
        help=f"all, {', '.join(groups)} (an epoch of each known run), or one of these",
    )
    parser.add_argument("--epochs", type=int, help="of the testbed's runs; all of them")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--cache", type=Path, default=ROOT / "logs" / "compared")
    parser.add_argument(
        "--old-run",
        nargs="+",
        default=[],
        metavar="RUN=FOLDER",
        help="finished runs of OLD, with as many epochs (shapes_sd3=logs/before)",
    )
    arguments = parser.parse_args()
    if Path(flow_grpo.__file__).resolve().parent.parent != ROOT:
        parser.error(f"flow_grpo comes from {flow_grpo.__file__}: set PYTHONPATH to {ROOT}")
    arguments.runs = groups if "all" in arguments.runs else arguments.runs
    pairs = (pair.partition("=") for pair in arguments.old_run)
    arguments.old_run = {name: Path(folder) for name, _, folder in pairs}
    return arguments


if __name__ == "__main__":
    sys.exit(main())
