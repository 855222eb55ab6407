"""Draw a chart as SVG inside a page: it takes the page's colours, light or dark, and its font."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTHS, HEIGHT = {"wide": 4.7, "narrow": 3.3}, 2.5  # inches; the page scales them
FONT_SIZE = 9.5  # points
MOST_POINTS, MOST_BARS = 240, 60
NUM_COLOURS = 6  # --series-1 ... of the page
PLACEHOLDERS = ("var(--ink-soft)", "var(--rule)")  # text, grid


@dataclass(frozen=True)
class Series:
    label: str
    x: list[float]
    y: list[float]
    colour: str  # in CSS
    low: list[float] | None = None  # a band around y
    high: list[float] | None = None
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """kind "lines": values over x. kind "stack": y is stacked up, a bar a stretch of x."""

    title: str
    note: str
    series: list[Series]
    x_label: str = "optimizer step"
    kind: str = "lines"
    limits: tuple[float, float] | None = None  # of y
    markers: bool = False
    width: str = "wide"


def colour(number: int) -> str:
    """Return the CSS colour of the number-th thing among equals."""
    return f"var(--series-{number % NUM_COLOURS + 1})"


def ramp(number: int, count: int) -> str:
    """Return the CSS colour of the number-th of `count` ordered things."""
    share = round(100 * number / max(1, count - 1))
    return f"color-mix(in oklab, var(--ramp-last) {share}%, var(--ramp-first))"


def draw(chart: Chart, prefix: str) -> str:
    """Return the chart as an <svg> element. prefix: of its ids, for no two on a page may be equal.

    matplotlib knows no CSS: it draws with colours that stand for those of the page.
    """
    css = [*PLACEHOLDERS, *dict.fromkeys(series.colour for series in chart.series)]
    stand_in = {name: f"#0000{number:02x}" for number, name in enumerate(css, start=1)}
    width = WIDTHS[chart.width]
    figure = Figure(figsize=(width, HEIGHT))
    axes = figure.add_axes((0.62 / width, 0.19, 1 - 0.7 / width, 0.7))
    if chart.kind == "stack":
        _stack(axes, chart, stand_in)
    else:
        _lines(axes, chart, stand_in)
    _dress(axes, chart, stand_in)
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    return _inline(buffer.getvalue(), stand_in, prefix, chart)


def _lines(axes: Axes, chart: Chart, stand_in: dict[str, str]) -> None:
    for series in chart.series:
        x, y = thin(series.x), thin(series.y)
        marker = "o" if chart.markers or len(x) == 1 else None
        shade = stand_in[series.colour]
        style = (0, (4, 2)) if series.dashed else "-"
        axes.plot(x, y, color=shade, linewidth=1.6, linestyle=style, marker=marker, markersize=3.5)
        if series.low and series.high:
            low, high = thin(series.low), thin(series.high)
            axes.fill_between(x, low, high, color=shade, alpha=0.16, linewidth=0)


def _stack(axes: Axes, chart: Chart, stand_in: dict[str, str]) -> None:
    below = None
    for series in chart.series:
        x, y = thin(series.x, MOST_BARS), thin(series.y, MOST_BARS)
        below = np.zeros_like(y) if below is None else below
        width = 0.82 * (x[1] - x[0] if len(x) > 1 else 1)
        axes.bar(x, y, width, below, color=stand_in[series.colour], linewidth=0)
        below = below + y


def _dress(axes: Axes, chart: Chart, stand_in: dict[str, str]) -> None:
    ink, rule = (stand_in[name] for name in PLACEHOLDERS)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(rule)
    axes.grid(axis="y", color=rule, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=ink, labelsize=FONT_SIZE, length=0, pad=4)
    axes.yaxis.offsetText.set(color=ink, fontsize=FONT_SIZE)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4), useOffset=False)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel(chart.x_label, color=ink, fontsize=FONT_SIZE, labelpad=3)
    axes.margins(x=0.02)
    if chart.limits:
        axes.set_ylim(chart.limits)
    elif chart.kind == "stack":
        axes.set_ylim(bottom=0)
    elif not any(value for series in chart.series for value in series.y):
        axes.set_ylim(-0.02, 1)  # all zero: a flat line at the bottom


def _inline(svg: str, stand_in: dict[str, str], prefix: str, chart: Chart) -> str:
    """Keep only what a page needs of a file: no header, no font, no colour of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    svg = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    for css, hexadecimal in stand_in.items():
        svg = svg.replace(hexadecimal, css)
    box = f"0 0 {72 * WIDTHS[chart.width]:g} {72 * HEIGHT:g}"
    tag = f'<svg role="img" aria-label="{html.escape(chart.title)}" viewBox="{box}">'
    return tag + svg[svg.index(">") + 1 :]


def thin(values: list[float], most: int = MOST_POINTS) -> np.ndarray:
    """Average runs of values so that at most `most` are left; what is not finite is left out."""
    finite = np.array(values, dtype=float)
    finite[~np.isfinite(finite)] = np.nan
    if len(finite) <= most:
        return finite
    return np.array([_mean(part) for part in np.array_split(finite, most)])


def _mean(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else np.nan


def drawn(charts: list[Chart], prefix: str) -> Iterator[tuple[Chart, str]]:
    """Yield each chart with its drawing."""
    for number, chart in enumerate(charts):
        yield chart, draw(chart, f"{prefix}{number}")
