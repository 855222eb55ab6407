"""Measure how often a clip range and one in nats are reached, at several sizes, steps and kernels.

    python scripts/testbed/clip.py --out logs/clip --jobs 2

Each cell is config/testbed.py:shapes_sd3_grpo for a few epochs of four optimizer steps, with
train.clip_range as the testbed has it and with train.clip_nats as much at 32 pixels. Writes
clip.md to --out: the share of ratios beyond the range in the second to fourth steps, and their
spread. A finished run is not repeated.
"""

import argparse
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from proof import ROOT, execute
from tqdm import tqdm

from flow_grpo.report.output import read_metrics

CONFIG = "config/testbed.py:shapes_sd3_grpo"
RANGES = {"clip_range=1e-3": {}, "clip_nats=1.024": {"train.clip_nats": 1.024}}  # 32 px: D = 1024
CELLS = [(size, steps, "sde") for size in (16, 32) for steps in (6, 12)] + [(32, 6, "cps")]
CPS = {"sample.noise_level": 0.8, "train.step_weight": "none"}


def keys(size: int, steps: int, kernel: str) -> dict:
    """Return what differs in a cell; its window lies in the same part of the path."""
    found = {"resolution": size, "sample.num_steps": steps, "sample.sde_type": kernel}
    found["sample.sde_window_range"] = f"(0, {steps * 4 // 6})"
    return found | (CPS if kernel == "cps" else {})


def run(out: Path, cell: tuple[int, int, str], name: str, seed: int, epochs: int) -> list[dict]:
    """Train a cell with a range, unless it was; return the updates behind an epoch's first."""
    size, steps, kernel = cell
    folder = f"{size}-{steps}-{kernel}-{name.partition('=')[0]}-{seed}"
    options = keys(*cell) | RANGES[name]
    options |= {"logdir": out, "run_name": folder, "seed": seed, "num_epochs": epochs}
    options |= {"train.learning_rate": 3e-4, "train.gradient_accumulation_steps": 1}
    options |= {"eval_freq": 10_000, "eval_max_samples": 1, "save_freq": 10_000}
    options |= {"resume_from": "auto", "tracker": "none"}
    options |= {"reward_fn": {"jpeg_incompressibility": 1.0}}  # that of images of any size
    command = [sys.executable, str(ROOT / "scripts/train_sd3.py"), "--config", CONFIG]
    command += [f"--config.{key}={value}" for key, value in options.items()]
    execute(command, out / f"{folder}.log")
    return [row for row in read_metrics(out / folder, "update") if row["step"] % 4 != 1]


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=2, help="at a time, one thread each")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    jobs = [(cell, name) for cell in CELLS for name in RANGES]
    with ThreadPoolExecutor(args.jobs) as pool:
        work = pool.map(lambda job: run(out, *job, args.seed, args.epochs), jobs)
        found = dict(zip(jobs, tqdm(work, total=len(jobs), desc="runs"), strict=True))
    lines = [
        f"| image, steps, kernel | {' | '.join(RANGES)} | std of the ratio |",
        "|---|---|---|---|",
    ]
    for cell in CELLS:
        of_range = [found[cell, name] for name in RANGES]
        beyond = [
            f"{np.mean([row['clip_high'] + row['clip_low'] for row in rows]):.1%}"
            for rows in of_range
        ]
        spread = np.mean([row["ratio_std"] for row in of_range[0]])
        size, steps, kernel = cell
        lines.append(f"| {size} px, {steps}, {kernel} | {' | '.join(beyond)} | {spread:.2g} |")
    lines += ["", f"Seed {args.seed}, {args.epochs} epochs; Python {platform.python_version()}, "]
    lines[-1] += f"torch {torch.__version__}."
    (out / "clip.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
