"""Scores of many rows as a table for a person and a csv file: in all and by tag, with intervals."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flow_grpo.evaluation.intervals import interval, mean, paired_interval
from flow_grpo.inputs import ALL, MEAN_OF_TAGS
from flow_grpo.prompts import Prompt


class Summary(NamedTuple):
    """One score over all rows, over those of a tag, or the mean of the tags' means."""

    score: str
    tag: str  # "": all rows; or MEAN_OF_TAGS
    num_rows: int  # that were scored
    num_missing: int
    num_prompts: int  # distinct, among the scored rows
    mean: float  # NaN: no row was scored
    low: float  # of the mean's 95 % interval; NaN: there are fewer than two prompts
    high: float

    def __str__(self) -> str:
        return _cell(self.mean, self.low, self.high)


class Comparison(NamedTuple):
    """One score of two checkpoints on the same rows and noise; rows as in a Summary."""

    score: str
    tag: str
    num_rows: int  # that both scored
    difference: float  # mean of second - first
    low: float  # of the difference's paired 95 % interval
    high: float
    wins: int  # rows where the second is higher
    ties: int
    losses: int

    def __str__(self) -> str:
        return _cell(self.difference, self.low, self.high, "+")


def summarise(
    scores: dict[str, np.ndarray], tags: Sequence[str], prompts: Sequence[str]
) -> list[Summary]:
    """Average each score, {name: (N,)} with NaN for "could not be scored".

    tags, prompts: N; an empty tag is none. The rows of one prompt are resampled together.
    """
    summaries = []
    for name, values in scores.items():
        for tag, rows, texts, strata in _by_tag(tags, prompts):
            chosen, present = values[rows], ~np.isnan(values[rows])
            counts = int(present.sum()), int((~present).sum()), len(set(texts[present]))
            ends = interval(chosen, texts, strata)
            summaries.append(Summary(name, tag, *counts, mean(chosen, strata), *ends))
    return summaries


def compare(
    first: dict[str, np.ndarray],
    second: dict[str, np.ndarray],
    tags: Sequence[str],
    prompts: Sequence[str],
) -> list[Comparison]:
    """Compare row by row the scores that both have; arguments as summarise()."""
    comparisons = []
    for name in (name for name in first if name in second):
        for tag, rows, texts, strata in _by_tag(tags, prompts):
            ours, theirs = first[name][rows], second[name][rows]
            change = theirs - ours
            outcomes = [int(each.sum()) for each in (change > 0, change == 0, change < 0)]
            centre, ends = mean(change, strata), paired_interval(ours, theirs, texts, strata)
            comparisons.append(Comparison(name, tag, sum(outcomes), centre, *ends, *outcomes))
    return comparisons


def table(rows: Sequence[Summary] | Sequence[Comparison]) -> str:
    """Lay results out, a line a score and a column a tag."""
    names, tags = (list(dict.fromkeys(column)) for column in list(zip(*rows, strict=True))[:2])
    cells = {(row.score, row.tag): str(row) for row in rows}
    lines = [["", *(tag or ALL for tag in tags)]]
    lines += [[name, *(cells[name, tag] for tag in tags)] for name in names]
    widths = [max(map(len, column)) + 3 for column in zip(*lines, strict=True)]
    return "\n".join(
        "".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def outcomes(rows: Sequence[Comparison]) -> str:
    """Lay wins, ties and losses over all rows out, a line a score."""
    return "\n".join(
        f"{row.score}: {row.wins} rows higher, {row.ties} equal, {row.losses} lower"
        for row in rows
        if not row.tag
    )


def write_csv(path: Path, rows: Sequence[Summary] | Sequence[Comparison]) -> None:
    """Write results, a line each, floats in full."""
    write_rows(path, [row._asdict() for row in rows])


def write_scores(path: Path, scores: dict[str, np.ndarray], prompts: Sequence[Prompt]) -> None:
    """Write scores {name: (N,)}, a line a prompt."""
    rows = [
        {"row": n, "prompt": prompt.text, "tag": prompt.tag}
        | {name: values[n].item() for name, values in scores.items()}
        for n, prompt in enumerate(prompts)
    ]
    write_rows(path, rows)


def read_scores(path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """Read what write_scores() wrote: the prompts, and the scores {name: (N,)}, NaN where empty."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in (rows[0] if rows else ()) if name not in ("row", "prompt", "tag")]
    scores = {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}
    return [row["prompt"] for row in rows], scores


def write_rows(path: Path, rows: Sequence[dict]) -> None:
    """Write dicts of equal keys as csv."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _by_tag(
    tags: Sequence[str], prompts: Sequence[str]
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray | None]]:
    """Yield "" with which rows are meant, all; each tag; and from two tags on their mean.

    Then these rows' prompts, and their strata, of which every one counts alike, or None.
    """
    tags, texts = np.array(tags, dtype=object), np.array(prompts, dtype=object)
    names = sorted(set(tags) - {""})
    for tag in ("", *names):
        rows = (tags == tag) | (tag == "")
        yield tag, rows, texts[rows], None
    if len(names) > 1:
        rows = tags != ""
        yield MEAN_OF_TAGS, rows, texts[rows], tags[rows]


def _cell(value: float, low: float, high: float, sign: str = "") -> str:
    if np.isnan(value):
        return "-"
    if np.isnan(low):
        return f"{value:{sign}.3f}"
    # Two digits of the interval's width, and no fewer than three decimals.
    decimals = max(3, 1 - math.floor(math.log10(high - low))) if high > low else 3
    value, low, high = (f"{number:{sign}.{decimals}f}" for number in (value, low, high))
    return f"{value} [{low}, {high}]"
