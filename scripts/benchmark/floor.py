"""Compare a run's rollout and update with their floor: the model's bare calls, at the same shapes.

    OMP_NUM_THREADS=1 python scripts/benchmark/floor.py --config config/testbed.py:shapes_sd3

An epoch is run once to note every call of the transformer and of the VAE's parts: arguments, order,
whether a gradient was asked for. Then epochs and floors take turns. A floor calls the bare
modules again, each with a backward of its output's mean where there was a gradient, and steps
AdamW as often as the run did; nothing else. What a run adds to that is noise, log-probs, losses,
copies of weights, checks. Prints CPU seconds (on a GPU: seconds) of both and their ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from epoch import family_of
from torch import Tensor, nn
from tqdm import tqdm

from flow_grpo.launch import entry
from flow_grpo.training import collect, loop
from flow_grpo.training.run import Run

PHASES = ("rollout", "update")


class Call(NamedTuple):
    """One forward of a module, or (module None) a step of the optimizer."""

    module: nn.Module | None
    args: tuple = ()
    keywords: dict = {}
    graded: bool = False


def held(value):
    """Return what can be given to a module again."""
    return value.detach().clone() if isinstance(value, Tensor) else value


@contextlib.contextmanager
def noted(run: Run) -> Iterator[list[Call]]:
    """Note the calls of modules that no other one calls, and the optimizer's steps, meanwhile."""
    calls: list[Call] = []
    inside = False
    call_module, step = nn.Module.__call__, run.engine.step

    def call(module: nn.Module, *args, **keywords):
        nonlocal inside
        if inside:
            return call_module(module, *args, **keywords)
        kept = {name: held(value) for name, value in keywords.items()}
        calls.append(Call(module, tuple(map(held, args)), kept, torch.is_grad_enabled()))
        inside = True
        try:
            return call_module(module, *args, **keywords)
        finally:
            inside = False

    def note_step(norm: float) -> None:
        calls.append(Call(None))
        step(norm)

    nn.Module.__call__, run.engine.step = call, note_step
    try:
        yield calls
    finally:
        nn.Module.__call__ = call_module
        del run.engine.step


def replay(calls: list[Call], optimizer: torch.optim.Optimizer) -> None:
    for call in calls:
        if call.module is None:
            optimizer.step()
            optimizer.zero_grad()
            continue
        with torch.set_grad_enabled(call.graded):
            output = call.module(*call.args, **call.keywords)
        if call.graded:
            output = output if isinstance(output, Tensor) else output[0]
            output.float().mean().backward()


def now(device: torch.device) -> float:
    """Return the seconds of all of this process's threads; of the clock where a GPU works."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(act: Callable[[], None], device: torch.device) -> float:
    start = now(device)
    act()
    return now(device) - start


def compare(run: Run, num_epochs: int) -> dict[str, list[tuple[float, float]]]:
    """Return (the run's seconds, the floor's) of each epoch, by phase."""
    sampled = arranged = None

    def rollout() -> None:
        nonlocal sampled
        sampled = collect.roll_out(run, run.epoch)

    def weigh() -> None:
        nonlocal arranged
        arranged, _ = collect.weigh(run, sampled, collect.score(run, sampled), run.epoch)

    def update() -> None:
        loop.update(run, sampled, arranged, run.epoch)
        run.objective.after_epoch(run.snapshots, run.updater.num_updates)

    acts = {"rollout": rollout, "update": update}
    calls: dict[str, list[Call]] = {}
    for phase, act in acts.items():
        with noted(run) as calls[phase]:
            act()
        if phase == "rollout":
            weigh()
    # Its steps are real ones, with a rate of 0: the run's own weights stay.
    params = [p for p in run.pipeline.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=0.0, weight_decay=0.0, fused=True)
    found: dict[str, list[tuple[float, float]]] = {phase: [] for phase in PHASES}
    device = run.ranks.device
    for number in tqdm(range(num_epochs), "epochs"):
        run.epoch += 1
        for phase, act in acts.items():
            turns = {"run": act, "floor": lambda of=calls[phase]: replay(of, optimizer)}
            order = sorted(turns, reverse=number % 2 == 0)  # neither is always the first
            spent = {name: seconds(turns[name], device) for name in order}
            found[phase].append((spent["run"], spent["floor"]))
            if phase == "rollout":
                weigh()
    return found


def main(argv: list[str]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--config", default="config/testbed.py:shapes_sd3")
    parser.add_argument("--script", default="sd3", help="that trains it: sd3, flux ...")
    parser.add_argument("--epochs", type=int, default=6, help="that are timed")
    args, given = parser.parse_known_args(argv[1:])
    more = ["--config.tracker=none", f"--config.num_epochs={args.epochs + 1}", *given]
    run = entry.prepare(
        [argv[0], f"--config={args.config}", *more], family_of(args.script), args.config
    )
    found = compare(run, args.epochs)
    print("| phase | run, s | floor, s | ratio |\n|---|---|---|---|")
    for phase, pairs in found.items():
        ratios = [ours / floor for ours, floor in pairs]
        cells = [f"{statistics.median(each):.2f}" for each in zip(*pairs, strict=True)]
        spread = f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {phase} | {' | '.join(cells)} | {spread} |")
    run.close()


if __name__ == "__main__":
    main(sys.argv)
