"""Put a run's report together: one file that loads nothing from anywhere."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from flow_grpo.report import charts, facts, pictures, plots
from flow_grpo.report.recorded import Recorded

MOST_BYTES = 5_000_000
SPARE_BYTES = 100_000  # tags around the pictures


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
    values = _values(run, others)
    size = len(page.render(values, pictures=None).encode())
    shown = pictures.before_and_after(run, MOST_BYTES - size - SPARE_BYTES)
    text = page.render(values, pictures=shown)
    assert len(text.encode()) < MOST_BYTES, len(text.encode())
    return text


def _values(run: Recorded, others: list[Recorded]) -> dict:
    """What the template names, without the pictures."""
    drawings = {
        "evaluation": charts.evaluation(run, others),
        "tags": charts.tags(run, others),
        "rewards": charts.rewards(run),
        "denoising": charts.denoising(run),
        "updates": charts.updates(run),
        "speed": charts.speed(run),
    }
    launch = run.launches[-1] if run.launches else None
    return {
        "run": run,
        "what": facts.what(run),
        "num_epochs": len(run.epochs),
        "changes": facts.changes(run),
        "headline": facts.headline(run),
        "compared": facts.compared(run, others),
        "charts": {
            name: [(chart, plots.draw(chart)) for chart in some] for name, some in drawings.items()
        },
        "launch": launch,
        "versions": launch and ", ".join(f"{k} {v}" for k, v in launch["versions"].items()),
        "settings": facts.settings(run),
        "number": facts.number,
        "machine": facts.machine,
    }
