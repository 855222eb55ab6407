"""What a run achieved, for a person."""

from __future__ import annotations

import json
from pathlib import Path


def read_metrics(folder: Path, kind: str) -> list[dict]:
    """Return the rows of one kind (update | epoch | eval) of a run's metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def table(folder: Path) -> str:
    """Compare a run's first evaluation with its last, a line a score and a column a tag."""
    evaluations = read_metrics(folder, "eval")
    before, after = evaluations[0], evaluations[-1]
    scores = {k: v for k, v in after.items() if k not in ("kind", "epoch", "step")}
    names = [key for key in scores if "/" not in key and not key.endswith("_missing")]
    tags = sorted({key.split("/", 1)[1] for key in scores if "/" in key})
    lines = [
        "".join(
            f"{cell:>18}" for cell in [f"step {before['step']} -> {after['step']}", "all", *tags]
        )
    ]
    for name in names:
        keys = [name, *(f"{name}/{tag}" for tag in tags)]
        cells = (
            f"{before[key]:.3f} -> {after[key]:.3f}" if key in before and key in after else "-"
            for key in keys
        )
        lines.append(f"{name:>18}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)
