"""Lay a chart out: ticks, lines and bands, which chart.svg.j2 draws in the page's colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

WIDTHS, HEIGHT = {"wide": 340, "narrow": 240}, 180  # of the drawing; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 48, 6, 10, 38  # what is left of that for the axes' numbers
MOST_POINTS = 240
NUM_COLOURS = 6  # --series-1 ... of page.css
DASHES = ("dashed", "dotted")  # classes of page.css
Scale = Callable[[float | np.ndarray], np.ndarray]  # from values to places in the drawing


@dataclass(frozen=True)
class Series:
    label: str
    x: list[float]
    y: list[float]
    colour: str  # in CSS
    low: list[float] | None = None  # a band around y
    high: list[float] | None = None
    dash: str = ""  # of the line: "", or one of DASHES


@dataclass(frozen=True)
class Chart:
    title: str
    note: str
    series: list[Series]
    x_label: str = "optimizer step"
    limits: tuple[float, float] | None = None  # of y
    markers: bool = False
    width: str = "wide"


@dataclass(frozen=True)
class Curve:
    """A series in the drawing's coordinates; line and band are the "d" of an SVG path."""

    series: Series
    line: str
    band: str
    dots: list[tuple[float, float]]


@dataclass(frozen=True)
class Drawing:
    """What chart.svg.j2 draws; a tick is where it lies and what is written there."""

    width: float
    height: float
    left: float  # the axes' ends
    right: float
    floor: float
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    curves: list[Curve]


def colour(number: int) -> str:
    """Return the CSS colour of the number-th thing among equals."""
    return f"var(--series-{number % NUM_COLOURS + 1})"


def ramp(number: int, count: int) -> str:
    """Return the CSS colour of the number-th of `count` ordered things."""
    share = round(100 * number / max(1, count - 1))
    return f"color-mix(in oklab, var(--ramp-last) {share}%, var(--ramp-first))"


def draw(chart: Chart) -> Drawing:
    """Lay the chart out. Values that are not finite leave a gap."""
    right, floor = WIDTHS[chart.width] - RIGHT, HEIGHT - BOTTOM
    every_x = [x for series in chart.series for x in series.x]
    margin = 0.02 * (max(every_x) - min(every_x)) or 0.5
    x_limits = min(every_x) - margin, max(every_x) + margin
    y_limits = chart.limits or padded(chart.series)
    x, y = scale(x_limits, (LEFT, right)), scale(y_limits, (floor, TOP))
    return Drawing(
        width=WIDTHS[chart.width],
        height=HEIGHT,
        left=LEFT,
        right=right,
        floor=floor,
        x_ticks=[(x(v), text) for v, text in ticks(*x_limits, most=6, whole=True)],
        y_ticks=[(y(v), text) for v, text in ticks(*y_limits, most=5)],
        curves=[_curve(series, x, y, chart.markers) for series in chart.series],
    )


def scale(limits: tuple[float, float], ends: tuple[float, float]) -> Scale:
    """Return what maps values from between limits to between two places, to a tenth."""
    return lambda values: np.interp(values, limits, ends).round(1)


def _curve(series: Series, x: Scale, y: Scale, markers: bool) -> Curve:
    places, line, band, dots = x(thin(series.x)), "", "", []
    for rows in finite(places, y(thin(series.y))):
        line += f"M{_path(rows[:1])}L{_path(rows)}"
        if markers or len(rows) == 1:
            dots += rows
    if series.low and series.high:
        for rows in finite(places, y(thin(series.low)), y(thin(series.high))):
            there = [(a, low) for a, low, _ in rows]
            back = [(a, high) for a, _, high in reversed(rows)]
            band += f"M{_path(there + back)}Z"
    return Curve(series, line, band, dots)


def _path(points: list[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)


def finite(*columns: np.ndarray) -> Iterator[list[tuple]]:
    """Yield stretches of rows in which every value is finite."""
    for good, rows in groupby(zip(*columns, strict=True), lambda row: all(map(math.isfinite, row))):
        if good:
            yield list(rows)


def padded(series: list[Series]) -> tuple[float, float]:
    """Return limits of y with a margin around everything finite."""
    values = [v for s in series for part in (s.y, s.low or [], s.high or []) for v in part]
    values = [value for value in values if math.isfinite(value)]
    if not any(values):
        return -0.02, 1.0  # all zero: a flat line at the bottom
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05 * abs(high)
    return low - margin, high + margin


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[tuple[float, str]]:
    """Return up to most + 1 round values between low and high, with their texts."""
    rough = (high - low) / most
    power = math.floor(math.log10(rough))
    step = next(part * 10.0**power for part in (1, 2, 5, 10) if part * 10.0**power >= rough)
    step = max(step, 1.0) if whole else step
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(n * step, tick_text(n * step, step, max(abs(low), abs(high)))) for n in numbers]


def tick_text(value: float, step: float, largest: float) -> str:
    """Write a tick's value as exactly as its neighbours need it: 0.25, 120, −2e-5."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if decimals <= 4 and largest < 1e6:
        text = f"{value:.{decimals}f}"
    elif value == 0:
        text = "0"
    else:
        digits = math.floor(math.log10(abs(value)) + 1e-9) - math.floor(math.log10(step) + 1e-9)
        number, power = f"{value:.{max(0, digits)}e}".split("e")
        text = f"{number}e{int(power)}"
    return text.replace("-", "−", 1) if value < 0 else text


def thin(values: list[float], most: int = MOST_POINTS) -> np.ndarray:
    """Average runs of values so that at most `most` are left; what is not finite is left out."""
    kept = np.ma.masked_invalid(np.array(values, dtype=float))
    if len(kept) > most:
        kept = np.ma.stack([part.mean() for part in np.array_split(kept, most)])
    return kept.filled(np.nan)
