"""What a run achieved, for a person: a table, and report.html, a page of curves and images."""

from __future__ import annotations

import os
import traceback
import warnings
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from flow_grpo.report import charts, facts, images, plots, recorded
from flow_grpo.report.recorded import Recorded, read_metrics, score_names, tag_names

FILE = "report.html"
MOST_BYTES = 5_000_000
SPARE_BYTES = 100_000  # tags around the images


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


def render(run: Recorded, others: list[Recorded]) -> str:
    """Return the page, which loads nothing, smaller than MOST_BYTES; images get what is left."""
    page = Environment(
        loader=PackageLoader("flow_grpo.report", ""),
        autoescape=lambda name: name is not None and name.endswith(".j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
    ).get_template("page.html.j2")
    drawings = {
        "evaluation": charts.evaluation(run, others),
        "tags": charts.tags(run, others),
        "rewards": charts.rewards(run, others),
        "denoising": charts.denoising(run),
        "hacking": charts.hacking(run),
        "updates": charts.updates(run),
        "speed": charts.speed(run),
    }
    values = {
        "run": run,
        "what": facts.what(run),
        "changes": facts.changes(run),
        "headline": facts.headline(run),
        "signs": facts.signs(run),
        "others": others,
        "charts": {
            name: [(chart, plots.draw(chart)) for chart in some] for name, some in drawings.items()
        },
        "settings": facts.settings(run),
        "number": facts.number,
        "machine": facts.machine,
    }
    size = len(page.render(values, images=None).encode())
    shown = images.before_and_after(run, MOST_BYTES - size - SPARE_BYTES)
    text = page.render(values, images=shown)
    assert len(text.encode()) < MOST_BYTES, len(text.encode())
    return text


def write(folder: Path, others: list[Path] | None = None) -> Path:
    """Draw a run's report.html, with others over it. Raises ValueError if a folder is no run's."""
    run, compared = recorded.load(folder), [recorded.load(other) for other in others or []]
    text, path = render(run, compared), folder / FILE
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
