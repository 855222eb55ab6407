"""Lay some prompts of a run out, each before (above) and after (below) training, with a score.

    python scripts/testbed/strip.py logs/NAME --out docs/results/quick_strip.png

The prompts are spread evenly over those of the evaluation's sheets; none is chosen.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from flow_grpo.evaluation.evaluate import spread
from flow_grpo.evaluation.tables import read_scores
from flow_grpo.report.images import read_sheet, sheet_path
from flow_grpo.report.recorded import load
from flow_grpo.report.sheets import captioned_sheet

SCALE, LINE = 3, 2  # how often a pixel is repeated; pixels between the two images


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num", type=int, default=8, help="prompts")
    parser.add_argument("--score", default="shapes_strict")
    args = parser.parse_args()
    evaluations = load(args.run).evals
    steps = [evaluations[0]["step"], evaluations[-1]["step"]]
    (prompts, before), (_, after) = (read_sheet(sheet_path(args.run, step)) for step in steps)
    old, new = (scores(args.run, step, args.score) for step in steps)
    rows = spread(len(old))
    shown = range(0, len(prompts), len(prompts) // args.num)
    pairs = [stack(before[n], after[n]) for n in shown]
    captions = [f"{prompts[n]}\n{old[rows[n]]:g} -> {new[rows[n]]:g}" for n in shown]
    captioned_sheet(pairs, captions, args.num).save(args.out, optimize=True)


def scores(run: Path, step: int, name: str) -> list[float]:
    """Return a score of every evaluation prompt."""
    return read_scores(run / "evaluations" / f"{step:06d}.csv")[1][name].tolist()


def stack(first: Image.Image, second: Image.Image) -> np.ndarray:
    """Magnify two images and put the second below the first, uint8 (H, W, 3)."""
    large = [np.asarray(image).repeat(SCALE, 0).repeat(SCALE, 1) for image in (first, second)]
    line = np.full((LINE, *large[0].shape[1:]), 255, np.uint8)
    return np.concatenate([large[0], line, large[1]])


if __name__ == "__main__":
    main()
