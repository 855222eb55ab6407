"""UnifiedReward (arXiv:2503.05236), a judge of single images and of pairs."""

from __future__ import annotations

import re
from hashlib import blake2b
from itertools import combinations

import numpy as np

from flow_grpo.rewards.base import only_images
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.judges.judge import JudgeReward


class UnifiedReward(JudgeReward):
    """Score 1/5 to 1: the "Final Score" of the answer, from 1 to 5, divided by 5."""

    name = endpoint = "unifiedreward"
    pattern = r"final score(.*?)(?=final score|$)"
    lowest, highest = 1, 5


class UnifiedRewardPairs(JudgeReward):
    """Score each image by the share of its group that it wins against (Pref-GRPO, 2508.20751).

    Asks about every pair of a group once, G (G - 1) / 2 questions, which of the two is Image 1
    being drawn: judges favour a place. A pair without a verdict counts 1/2 to both, and an image
    none of whose pairs has one is NaN; `unifiedreward_pairs_unparsed` is each image's share of
    such pairs. Without groups, as in an evaluation, there is nothing to compare: all NaN.
    """

    name, endpoint = "unifiedreward_pairs", "unifiedreward"
    needs_groups = True

    def __call__(self, batch: Batch) -> dict:
        images = only_images(batch.images, self.name)
        group = np.arange(len(batch)) if batch.group is None else np.asarray(batch.group)
        members = [np.flatnonzero(group == g) for g in np.unique(group)]
        pairs = [pair for rows in members for pair in combinations(rows.tolist(), 2)]
        shown = [pair[::-1] if _swapped(*(images[n] for n in pair)) else pair for pair in pairs]
        answers = self.judge.ask(
            [([images[a], images[b]], self.about(batch.prompts[a])) for a, b in shown]
        )
        results = np.full((len(images), len(images)), np.nan)
        for (a, b), answer in zip(shown, answers, strict=True):
            verdicts = re.findall(r"image ([12]) is better", answer or "", re.IGNORECASE)
            if verdicts:
                results[a, b] = float(verdicts[-1] == "1")
                results[b, a] = 1 - results[a, b]
        return self._columns(results, members)

    def _columns(self, results: np.ndarray, members: list[np.ndarray]) -> dict[str, np.ndarray]:
        scores, missing = np.full((2, len(results)), np.nan)
        for rows in members:
            table = results[np.ix_(rows, rows)]
            verdicts = (~np.isnan(table)).sum(1)
            if len(rows) > 1:
                scores[rows] = np.where(verdicts > 0, win_rates(table), np.nan)
                missing[rows] = 1 - verdicts / (len(rows) - 1)
        return {self.name: scores, f"{self.name}_unparsed": missing}


def win_rates(results: np.ndarray) -> np.ndarray:
    """Turn the results of all pairs of a group into scores.

    results: (G, G), [i, j] is 1 where i beats j, 0 where it loses, NaN without a verdict, which
    counts 1/2; the diagonal is ignored. Returns (G,) in [0, 1], with sum G / 2 (Pref-GRPO).
    """
    others = ~np.eye(len(results), dtype=bool)
    results = np.nan_to_num(results, nan=0.5)
    assert ((results + results.T)[others] == 1).all(), "[i, j] and [j, i] must add up to 1"
    return np.where(others, results, 0).sum(1) / (len(results) - 1)


def _swapped(first: np.ndarray, second: np.ndarray) -> bool:
    """Toss a coin that depends on the two images alone."""
    digests = (blake2b(np.ascontiguousarray(image), digest_size=8) for image in (first, second))
    return blake2b(b"".join(each.digest() for each in digests)).digest()[0] % 2 == 1
