"""What a run achieved, for a person."""

from __future__ import annotations


def table(evaluations: list[dict[str, float]]) -> str:
    """Compare a run's first evaluation with its last, a line a score and a column a tag."""
    before, after = evaluations[0], evaluations[-1]
    names = [key for key in after if "/" not in key and not key.endswith("_missing")]
    tags = sorted({key.split("/", 1)[1] for key in after if "/" in key})
    lines = ["", f"{'':24}" + "".join(f"{tag:>18}" for tag in ["all", *tags])]
    for name in names:
        keys = [name, *(f"{name}/{tag}" for tag in tags)]
        cells = (
            f"{before[key]:.3f} -> {after[key]:.3f}" if key in before and key in after else "-"
            for key in keys
        )
        lines.append(f"{name:24}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)
