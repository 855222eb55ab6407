"""Time settings of a run against each other, epoch by epoch in turns, in one process.

    OMP_NUM_THREADS=1 python scripts/benchmark/levers.py --config config/testbed.py:shapes_sd3 \\
        --set train.stacked_points=3 --set "sample.branching=shared_prefix sample.same_latent=True"

Each --set is one setting, keys apart by spaces; the run as it is comes first. An epoch is the
loop's own: rollout, rewards, update. The first of each warms up. Prints seconds (on a CPU: of CPU
time) of rollout and update, medians over the epochs, passes of the transformer, and how many times
as long the epoch takes as the run's before it, with the least and the most.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from epoch import family_of, train_epoch
from floor import now
from tqdm import tqdm

from flow_grpo.launch import entry
from flow_grpo.training.run import Run


class Clock:
    """Stands in for a run's timer."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = now(self.device)
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now(self.device) - start

    def report(self) -> dict[str, float]:
        return {f"seconds/{phase}": value for phase, value in self.seconds.items()}


def prepare(config: str, keys: list[str], script: str, number: int) -> Run:
    argv = ["levers.py", f"--config={config}", *keys, f"--config.run_name=levers-{number}"]
    return entry.prepare(argv, family_of(script), config)


def measure(run: Run, epoch: int) -> dict[str, float]:
    """Train an epoch; return its seconds by phase, and in all."""
    device = run.ranks.device
    clock = run.timer = Clock(device)
    start = now(device)
    train_epoch(run, epoch)
    return {"sample": 0.0, "update": 0.0} | clock.seconds | {"epoch": now(device) - start}


def main(argv: list[str]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--config", default="config/testbed.py:shapes_sd3_grpo")
    parser.add_argument("--script", default="sd3", help="that trains it: sd3, flux ...")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEYS")
    parser.add_argument("--epochs", type=int, default=5, help="of each that are timed")
    args, given = parser.parse_known_args(argv[1:])
    given += [f"--config.num_epochs={args.epochs + 1}", "--config.tracker=none"]
    names = ["", *args.settings]
    runs = []
    for number, name in enumerate(names):
        keys = [f"--config.{key}" for key in name.split()]
        runs.append(prepare(args.config, [*given, *keys], args.script, number))
    found: list[list[dict[str, float]]] = [[] for _ in runs]
    for epoch in tqdm(range(args.epochs + 1), "epochs"):
        for run, of_run in zip(runs, found, strict=True):
            of_run.append(measure(run, epoch))
    print("| setting | passes an epoch | rollout, s | update, s | epoch, times the run's |")
    print("|---|---|---|---|---|")
    for name, run, of_run in zip(names, runs, found, strict=True):
        timed, usual = of_run[1:], found[0][1:]
        ratios = [a["epoch"] / b["epoch"] for a, b in zip(timed, usual, strict=True)]
        middle = {key: statistics.median(each[key] for each in timed) for key in timed[0]}
        passes = " + ".join(str(count) for count in run.passes().values() if count)
        cells = [f"`{name}`" if name else "the run", passes]
        cells += [f"{middle['sample']:.2f}", f"{middle['update']:.2f}"]
        cells += [f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"]
        print(f"| {' | '.join(cells)} |")
        run.close()


if __name__ == "__main__":
    main(sys.argv)
