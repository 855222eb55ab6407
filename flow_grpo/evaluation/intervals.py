"""95 % intervals by resampling prompts: the rows of one prompt are one piece of evidence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NUM_RESAMPLES = 2000
CHUNK = 2**22  # numbers held at once


def interval(
    values: np.ndarray,
    clusters: Sequence[str],
    strata: Sequence[str] | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of all rows, or of the strata's means.

    values: (N,) float; NaN rows are left out. clusters: N names; rows of one name are drawn
    together (Field and Welsh, J. R. Statist. Soc. B 69, 2007). strata: N names; then clusters are
    drawn within each, and each counts alike. level: in (0, 1). Deterministic. (nan, nan) where
    there are fewer than two clusters (of any stratum), which say nothing of other prompts. Where
    all values are equal the interval has no width, however few they are.
    """
    values = np.asarray(values, dtype=np.float64)
    present, rng = ~np.isnan(values), np.random.default_rng(seed)
    names = np.asarray(clusters, dtype=object).astype(str)
    centres, resampled = [], []
    for rows in _rows_of(present, strata):
        _, index = np.unique(names[rows], return_inverse=True)
        counts = np.bincount(index)
        if len(counts) < 2:
            return float("nan"), float("nan")
        # Less the mean of all, so that equal values stay equal to the last bit.
        centres.append(values[rows].mean())
        sums = np.bincount(index, weights=values[rows] - centres[-1])
        resampled.append(_resampled_means(sums, counts, rng))
    quantiles = np.quantile(np.mean(resampled, axis=0), [(1 - level) / 2, (1 + level) / 2])
    low, high = np.mean(centres) + quantiles
    return float(low), float(high)


def paired_interval(
    first: np.ndarray,
    second: np.ndarray,
    clusters: Sequence[str],
    strata: Sequence[str] | None = None,
) -> tuple[float, float]:
    """Return the interval() of the mean of second - first, (N,) each; a row needs both."""
    difference = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    return interval(difference, clusters, strata)


def mean(values: np.ndarray, strata: Sequence[str] | None = None) -> float:
    """Return the mean of all rows, or of the strata's means, without NaN; NaN if one has no row."""
    values = np.asarray(values, dtype=np.float64)
    parts = [values[rows] for rows in _rows_of(~np.isnan(values), strata)]
    return float(np.mean([part.mean() if len(part) else np.nan for part in parts]))


def _rows_of(present: np.ndarray, strata: Sequence[str] | None) -> list[np.ndarray]:
    """The present rows' numbers: of all, or of each stratum."""
    if strata is None:
        return [np.flatnonzero(present)]
    names = np.asarray(strata, dtype=object)
    return [np.flatnonzero(present & (names == name)) for name in dict.fromkeys(strata)]


def _resampled_means(sums: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw C clusters with replacement NUM_RESAMPLES times; sums, counts: (C,)."""
    means, at_once = [], max(1, CHUNK // len(sums))
    for start in range(0, NUM_RESAMPLES, at_once):
        rows = min(at_once, NUM_RESAMPLES - start)
        drawn = rng.integers(len(sums), size=(rows, len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return np.concatenate(means)
