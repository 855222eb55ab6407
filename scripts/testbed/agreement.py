"""Measure how well the gradients of independent epochs agree, for the CPU time that they take.

    OMP_NUM_THREADS=1 python scripts/testbed/agreement.py --out logs/agreement

Each run of objectives.py draws --epochs epochs from the testbed's base, without a step in between,
so that only prompts and noise differ. Of their gradients:

cosine   the mean over pairs of epochs
as Adam  the same, each element divided by its root mean square over the epochs
signal   with c the latter: c / (1 - c), the squared signal-to-noise ratio of one epoch, in an
         epoch's CPU time; per 100 seconds. Twice the images have twice as much of it

Errors are a jackknife's over epochs. Writes a file for each run and agreement.md to --out; what is
there is not measured again. --only names runs; several processes may share the work.
--config.KEY=VALUE counts more than a run's: with train.shuffle_advantages=True, what is left of the
agreement does not come from the rewards.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch
from objectives import CONFIG, RUNS
from torch import Tensor
from tqdm import tqdm

from flow_grpo.diffusers_patch.sd3 import SD3
from flow_grpo.launch.entry import prepare
from flow_grpo.training import collect, loop
from flow_grpo.training.run import Run


class Kept:
    """Takes the place of a run's updater: keeps each gradient, and never steps."""

    num_updates = 0

    def __init__(self, run: Run):
        self.engine, self.of_epoch = run.engine, []

    def finish(self, loss: float, norm: float) -> bool:
        params = [param for param in self.engine.module.parameters() if param.requires_grad]
        self.of_epoch.append(torch.cat([param.grad.flatten() for param in params]))
        self.engine.discard(overflow=False)
        return False


def gradients(
    name: str, out: Path, num_epochs: int, seed: int, more: list[str]
) -> tuple[Tensor, float]:
    """Return each epoch's gradient (num_epochs, P) at the base, and an epoch's CPU seconds."""
    keys = {"logdir": out, "run_name": f"{name.replace(' ', '-')}-{os.getpid()}", "seed": seed}
    keys |= {"num_epochs": num_epochs, "train.hold_start": False, "train.ema": False} | RUNS[name]
    given = [f"--config.{key}={value}" for key, value in keys.items()]
    run = prepare(["agreement.py", f"--config={CONFIG}", *given, *more], SD3, CONFIG)
    found, kept = [], Kept(run)
    run.updater = kept
    start = time.process_time()
    for epoch in tqdm(range(num_epochs), name):
        sampled, scores = collect.collect(run, epoch)
        arranged, _ = collect.weigh(run, sampled, scores, epoch)
        loop.update(run, sampled, arranged, epoch)
        found.append(torch.stack(kept.of_epoch).mean(0))
        kept.of_epoch.clear()
    seconds = (time.process_time() - start) / num_epochs
    run.close()
    return torch.stack(found), seconds


def mean_cosine(rows: Tensor) -> float:
    """Return the mean cosine of two of the rows (K, P)."""
    units = torch.nn.functional.normalize(rows.double(), dim=1)
    number = len(units)
    return float((units.sum(0).square().sum() - number) / (number * (number - 1)))


def as_adam(rows: Tensor) -> Tensor:
    return rows / rows.square().mean(0).sqrt().clamp(min=1e-30)


def jackknife(rows: Tensor, statistic) -> tuple[float, float]:
    """Return a statistic of all rows, and its standard error from those of all but one."""
    number = len(rows)
    left = torch.tensor([statistic(rows[torch.arange(number) != i]) for i in range(number)])
    spread = (left - left.mean()).square().sum() * (number - 1) / number
    return statistic(rows), float(spread.sqrt())


def measure(name: str, out: Path, num_epochs: int, seed: int, more: list[str]) -> dict:
    rows, seconds = gradients(name, out, num_epochs, seed, more)

    def adam(some: Tensor) -> float:
        return mean_cosine(as_adam(some))

    def signal(some: Tensor) -> float:
        return 100 / seconds * adam(some) / (1 - adam(some))

    statistics = {"cosine": mean_cosine, "adam": adam, "signal": signal}
    found = {key: jackknife(rows, each) for key, each in statistics.items()}
    return {"name": name, "seconds": seconds, "epochs": num_epochs} | found


def table(rows: list[dict]) -> list[str]:
    """Return a Markdown table, the strongest signal first."""
    lines = [
        "| | CPU s an epoch | cosine | as Adam | signal in 100 CPU s |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -row["signal"][0]):
        cosine, adam = (f"{row[key][0]:.3f} ± {row[key][1]:.3f}" for key in ("cosine", "adam"))
        signal = f"**{row['signal'][0]:.2f}** ± {row['signal'][1]:.2f}"
        lines.append(f"| `{row['name']}` | {row['seconds']:.1f} | {cosine} | {adam} | {signal} |")
    return lines


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=42)
    args, more = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        note = args.out / f"{name.replace(' ', '-')}.json"
        if not note.exists():
            found = measure(name, args.out.resolve(), args.epochs, args.seed, more)
            note.write_text(json.dumps(found))
    rows = [json.loads(path.read_text()) for path in sorted(args.out.glob("*.json"))]
    machine = f"Python {platform.python_version()}, torch {torch.__version__}"
    said = [*table(rows), "", f"Seed {args.seed}, {args.epochs} epochs; {machine}."]
    (args.out / "agreement.md").write_text("\n".join(said) + "\n")
    print("\n".join(said))


if __name__ == "__main__":
    main()
