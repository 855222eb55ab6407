"""What a run achieved, for a person: a table, and report.html, a page of curves and images."""

from __future__ import annotations

import os
import traceback
import warnings
from pathlib import Path

from flow_grpo.report import page, recorded
from flow_grpo.report.recorded import read_metrics, score_names, tag_names

FILE = "report.html"


def table(folder: Path) -> str:
    """Compare a run's first evaluation with its last: one line per score, one column per tag."""
    evaluations = read_metrics(folder, "eval")
    before, after = evaluations[0], evaluations[-1]
    tags = tag_names(after)
    lines = [
        "".join(
            f"{cell:>18}" for cell in [f"step {before['step']} -> {after['step']}", "all", *tags]
        )
    ]
    for name in score_names(after):
        keys = [name, *(f"{name}/{tag}" for tag in tags)]
        cells = (
            f"{before[key]:.3f} -> {after[key]:.3f}" if key in before and key in after else "-"
            for key in keys
        )
        lines.append(f"{name:>18}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def write(folder: Path, others: list[Path] | None = None) -> Path:
    """Draw a run's report.html from what is in its folder, and return its path.

    others: runs whose evaluations are drawn over this one's.
    Raises ValueError if a folder is not a run's.
    """
    run, compared = recorded.load(folder), [recorded.load(other) for other in others or []]
    text, path = page.render(run, compared), folder / FILE
    aside = path.with_suffix(".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
    return path


def redraw(folder: Path) -> None:
    """Write the report of a run in progress; a failure is a warning, for training matters more."""
    try:
        write(folder)
    except Exception:
        warnings.warn(f"{folder / FILE} was not drawn:\n{traceback.format_exc()}", stacklevel=2)
