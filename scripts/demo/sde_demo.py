"""Draw one prompt with each stochastic kernel at several noise levels, from the same noise.

    python scripts/demo/sde_demo.py --model scripts/testbed/base --size 32 --guidance 1 \\
        --max_sequence_length 10 --prompt "three blue squares" --out sde_demo

All steps but the last are stochastic, as in a full-trajectory run. OUT.png has one row per kernel,
the deterministic image first. Three figures stand below each image and in OUT.csv:

measured  the std of white noise in the final latents, in units of their own std, estimated by a
          3 x 3 filter that gives 0 on planes (J. Immerkaer, 1996). Texture counts too, so compare
          it with that of the deterministic image.
left      the noise after the last stochastic step, by the kernel's formula
due       the noise level that the model expects there

The final step, which is deterministic, hardly removes what is left beyond what is due.
scripts/demo/noise_level.py plots all steps.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from config.base import base
from flow_grpo import sde
from flow_grpo.cli import make_writable, user_errors, user_path
from flow_grpo.evaluation import comparison
from flow_grpo.launch import tools
from flow_grpo.report.sheets import captioned_sheet
from flow_grpo.sampling import decode

LEVELS = {"sde": (0.3, 0.7, 1.0), "cps": (0.3, 0.8, 1.0), "dance": (0.1, 0.3, 0.6)}


class Cell(NamedTuple):
    kernel: str
    noise_level: float
    measured: float
    left: float
    due: float
    image: np.ndarray  # uint8 (H, W, 3)


def main(argv: list[str]) -> None:
    """Write OUT.png and OUT.csv, and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tools.add_options(parser)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--out", type=user_path, required=True, help="path without an ending")
    args = parser.parse_args(argv[1:])
    with user_errors():
        make_writable(args.out.parent, "--out")
        loaded = tools.load(args, (args.prompt,), base(None))
    cells = list(draw(loaded))
    with args.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Cell._fields[:-1])
        writer.writerows([*c[:2], *(round(value, 4) for value in c[2:5])] for c in cells)
    captions = [
        f"{c.kernel} {c.noise_level:g}\nmeasured {c.measured:.3f}\n"
        f"left {c.left:.3f}\ndue {c.due:.3f}"
        for c in cells
    ]
    columns = len(cells) // len(LEVELS)
    captioned_sheet([c.image for c in cells], captions, columns).save(args.out.with_suffix(".png"))
    print(*(caption.replace("\n", ", ") for caption in captions), sep="\n")
    print(f"{args.out.with_suffix('.png')}, {args.out.with_suffix('.csv')}")


def draw(loaded: tools.Loaded) -> Iterator[Cell]:
    """Draw one row per kernel: without noise, then at each of its levels."""
    pipeline, task = loaded.pipeline, loaded.task
    batch, plain = task.batch(pipeline, [0]), task.schedule(pipeline)
    for kernel, levels in LEVELS.items():
        for level in (0.0, *levels):
            schedule = replace(plain, kind=kernel, noise_level=level)
            rollout = comparison.draw(pipeline, batch, schedule)
            image = decode(pipeline, rollout)[0]
            shown = image if image.ndim == 3 else image[len(image) // 2]
            latents = pipeline.vae_latents(rollout.final, task.size).double().cpu().numpy()
            *_, before, after, _ = schedule.sigmas.tolist()
            kind, guard = kernel if level else "ode", schedule.sigmas[1].item()
            left = sde.leftover_noise(kind, before, after, level, guard).item()
            yield Cell(kernel, level, white_noise(latents) / latents.std(), left, after, shown)


def white_noise(values: np.ndarray) -> float:
    """Estimate the std of white noise on a grid, (..., height, width)."""
    rows = values[..., :-2, :] - 2 * values[..., 1:-1, :] + values[..., 2:, :]
    filtered = rows[..., :-2] - 2 * rows[..., 1:-1] + rows[..., 2:]  # its weights' squares: 36
    return float(np.abs(filtered).mean() * math.sqrt(math.pi / 2) / 6)


if __name__ == "__main__":
    main(sys.argv)
