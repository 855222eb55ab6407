"""Put a run's report together: one file that loads nothing from anywhere."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from flow_grpo.report import charts, facts, images, plots
from flow_grpo.report.recorded import Recorded

MOST_BYTES = 5_000_000
SPARE_BYTES = 100_000  # tags around the images


def render(run: Recorded, others: list[Recorded]) -> str:
    """Return the page, smaller than MOST_BYTES; images get what the rest leaves.

    others: runs whose evaluations are drawn over this one's.
    """
    page = Environment(
        loader=PackageLoader("flow_grpo.report", ""),
        autoescape=lambda name: name is not None and name.endswith(".j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
    ).get_template("page.html.j2")
    drawings = {
        "evaluation": charts.evaluation(run, others),
        "tags": charts.tags(run, others),
        "rewards": charts.rewards(run),
        "denoising": charts.denoising(run),
        "updates": charts.updates(run),
        "speed": charts.speed(run),
    }
    values = {
        "run": run,
        "what": facts.what(run),
        "changes": facts.changes(run),
        "headline": facts.headline(run),
        "compared": facts.compared(run, others),
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
