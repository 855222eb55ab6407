"""Lay some prompts of a run out, each before (above) and after (below) training.

    python scripts/testbed/strip.py logs/NAME --out docs/results/testbed_strip.png

The prompts are spread evenly over those of the evaluation's sheets; none is chosen.
"""

import argparse
from pathlib import Path

import numpy as np

from flow_grpo.report import recorded
from flow_grpo.report.pictures import read_sheet, sheet_path
from flow_grpo.report.sheets import captioned_sheet

SCALE, LINE = 3, 2  # of an image's pixels; pixels between the two


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num", type=int, default=8, help="prompts")
    args = parser.parse_args()
    run = recorded.load(args.run)
    prompts, before = read_sheet(sheet_path(run.folder, run.evals[0]["step"]))
    _, after = read_sheet(sheet_path(run.folder, run.evals[-1]["step"]))
    shown = range(0, len(prompts), len(prompts) // args.num)
    pairs = [stack(before[n], after[n]) for n in shown]
    sheet = captioned_sheet(pairs, [prompts[n] for n in shown], args.num)
    sheet.save(args.out, optimize=True)


def stack(first, second) -> np.ndarray:
    """Magnify two images and put the second below the first, uint8 (H, W, 3)."""
    large = [np.asarray(image).repeat(SCALE, 0).repeat(SCALE, 1) for image in (first, second)]
    line = np.full((LINE, *large[0].shape[1:]), 255, np.uint8)
    return np.concatenate([large[0], line, large[1]])


if __name__ == "__main__":
    main()
