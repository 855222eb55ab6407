"""Plot how much noise each stochastic step leaves, beside what the schedule says.

    python scripts/demo/noise_level.py --model sd3 --out docs/results/noise_sd3

A state at noise level sigma should be (1 - sigma) x0 + sigma x1. A stochastic step keeps part of
the old noise and adds fresh noise; the standard deviation of both together should be sigma_next. As
in Figure 2 of Flow-CPS (arXiv:2509.05952), each step starts from a state that is on schedule, and
the model is assumed to be right. Writes OUT.csv and OUT.png; docs/noise.md reads them.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
from pathlib import Path

import matplotlib
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from flow_grpo import sde
from flow_grpo.cli import make_writable, user_errors, user_path

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend)

DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "base_image_seq_len": 256}
SCHEDULERS = {  # as in scheduler/scheduler_config.json of the released pipelines
    "sd3": {"shift": 3.0},
    "flux": DYNAMIC | {"shift": 3.0, "max_shift": 1.15, "max_image_seq_len": 4096},
    "qwen": DYNAMIC | {"max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02},
}
NO_GRID = {"sd3", "StableDiffusion3Pipeline"}  # the scheduler's own grid, not 1 ... 1 / N
LEVELS = {kind: kernel.default_level for kind, kernel in sde.KERNELS.items()}


def schedule(model: str, num_steps: int, size: int) -> torch.Tensor:
    """Return the noise levels (num_steps + 1,) fp32, 1 ... 0.

    model: a name of SCHEDULERS or a pipeline's folder. size: pixels of a square image, for
    schedules that depend on it (16 x 16 pixels are a token).
    """
    kind, config = model, SCHEDULERS.get(model)
    if config is None:
        folder = Path(model)
        if not (folder / "scheduler" / "scheduler_config.json").is_file():
            raise SystemExit(
                f"--model {model}: one of {', '.join(SCHEDULERS)} or a pipeline folder with "
                f"scheduler/scheduler_config.json is needed."
            )
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    more = {} if kind in NO_GRID else {"sigmas": np.linspace(1, 1 / num_steps, num_steps)}
    if scheduler.config.use_dynamic_shifting:
        shift = scheduler.config
        more["mu"] = calculate_shift(
            (size // 16) ** 2,
            shift.base_image_seq_len,
            shift.max_image_seq_len,
            shift.base_shift,
            shift.max_shift,
        )
    scheduler.set_timesteps(num_steps, **more)
    return scheduler.sigmas


def leftovers(kind: str, level: float, sigmas: torch.Tensor) -> list[dict]:
    """Measure the noise after each step but the last, which is never stochastic.

    Feeds sde.step with x0 = 0 and x1 = 1, whose velocity is 1: the mean is then the weight that the
    old noise keeps. It and the fresh noise are independent, so their variances add up.
    """
    one, rows = torch.ones(1, 1, dtype=torch.float64), []
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-2], sigmas[1:-1], strict=True)):
        step = sde.step(
            kind,
            one,
            sigma * one,
            sigma,
            sigma_next,
            level,
            sigma_guard=sigmas[1],
            noise=None if kind == "ode" else 0 * one,
        )
        kept, fresh, scheduled = step.mean.item(), step.std.item(), sigma_next.item()
        total = float(np.hypot(kept, fresh))
        rows.append(
            {
                "kernel": kind,
                "noise_level": level,
                "step": i,
                "sigma": sigma.item(),
                "scheduled": scheduled,
                "kept": kept,
                "fresh": fresh,
                "total": total,
                "ratio": total / scheduled,
            }
        )
    return rows


def plot(rows: list[dict], title: str, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    names = list(dict.fromkeys((row["kernel"], row["noise_level"]) for row in rows))
    for size, (marker, name) in enumerate(zip("osv^D*" * len(names), names, strict=False)):
        mine = [row for row in rows if (row["kernel"], row["noise_level"]) == name]
        steps = [row["step"] for row in mine]
        label = name[0] if name[0] == "ode" else f"{name[0]}, noise_level {name[1]:g}"
        style = {"marker": marker, "markersize": 4 + 2 * size, "linewidth": 1.2, "label": label}
        style["markerfacecolor"] = "none"  # kernels that agree stay visible
        left.plot(steps, [row["total"] for row in mine], **style)
        right.plot(steps, [row["ratio"] for row in mine], **style)
    left.plot(steps, [row["scheduled"] for row in mine], "k--", linewidth=1, label="scheduled")
    left.set(xlabel="step", ylabel="std of the noise after the step", ylim=(0, None))
    right.set(xlabel="step", ylabel="noise / scheduled noise", yscale="log")
    left.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        type=os.path.expanduser,
        default="sd3",
        help="sd3 | flux | qwen | a pipeline's folder",
    )
    parser.add_argument("--num-steps", type=int, default=10)
    parser.add_argument("--size", type=int, default=512, help="pixels of a side")
    parser.add_argument("--kernels", nargs="+", help="KIND=NOISE_LEVEL, such as sde=0.7 cps=0.8")
    parser.add_argument(
        "--out", type=user_path, help="path without an ending; default: noise_MODEL"
    )
    given = parser.parse_args()
    kernels = [text.partition("=") for text in given.kernels or ()]
    if wrong := [kind for kind, _, _ in kernels if kind not in sde.KERNELS]:
        parser.error(f"--kernels: {wrong[0]!r} is none of {', '.join(sde.KERNELS)}")
    try:
        chosen = [(kind, float(level or LEVELS[kind])) for kind, _, level in kernels]
    except ValueError as error:
        parser.error(f"--kernels: KIND or KIND=NOISE_LEVEL is needed, such as sde=0.7 ({error})")
    for kind, level in chosen:
        if not 0 <= level <= sde.KERNELS[kind].max_level or math.isinf(level):
            parser.error(
                f"--kernels {kind}={level}: at least 0 and at most {sde.KERNELS[kind].max_level} "
                f"is needed"
            )
    name = Path(given.model).name
    out = given.out or Path(f"noise_{name}")
    with user_errors():
        make_writable(out.parent, "--out")
    sigmas = schedule(given.model, given.num_steps, given.size)
    rows = [
        row for kind, level in chosen or LEVELS.items() for row in leftovers(kind, level, sigmas)
    ]
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(
            {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
    plot(rows, f"{name}, {given.num_steps} steps, {given.size} pixels", out.with_suffix(".png"))
    print(f"scheduled after step {rows[-1]['step']}: {rows[-1]['scheduled']:.4f}")
    for row in rows:
        if row["step"] == rows[-1]["step"]:
            print(f"{row['kernel']} {row['noise_level']:g}: {row['total']:.4f}")
    print(f"{out.with_suffix('.csv')}, {out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
