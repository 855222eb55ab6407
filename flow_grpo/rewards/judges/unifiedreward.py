"""UnifiedReward (arXiv:2503.05236), a judge of single pictures and of pairs."""

from __future__ import annotations

import re
import zlib
from itertools import combinations

import numpy as np

from flow_grpo.rewards.base import only_pictures
from flow_grpo.rewards.judges.judge import JudgeReward, Question


class UnifiedReward(JudgeReward):
    """Score 1/5 to 1: the "Final Score" of the answer, from 1 to 5, divided by 5."""

    name = endpoint = "unifiedreward"
    pattern = r"final score\W*(\d+(?:\.\d+)?)"
    lowest, highest = 1, 5


class UnifiedRewardPairs(JudgeReward):
    """Score each picture by the share of its group that it wins against (Pref-GRPO, 2508.20751).

    Asks about every pair of a group once, G (G - 1) / 2 questions, which of the two is Image 1
    being drawn: judges favour a place. A pair without a verdict counts 1/2 to both, and a picture
    none of whose pairs has one is NaN; `unifiedreward_pairs_unparsed` is each picture's share of
    such pairs. Without groups, as in an evaluation, there is nothing to compare: all NaN.
    """

    name, endpoint = "unifiedreward_pairs", "unifiedreward"
    needs_groups = True

    def __call__(self, images, prompts, metadata, references=None, group=None) -> dict:
        only_pictures(images, self.name)
        group = np.arange(len(images)) if group is None else np.asarray(group)
        members = [np.flatnonzero(group == g) for g in np.unique(group)]
        pairs = [pair for rows in members for pair in combinations(rows.tolist(), 2)]
        shown = [pair[::-1] if _swapped(*(images[n] for n in pair)) else pair for pair in pairs]
        answers = self.judge.ask(
            [Question([images[a], images[b]], self.about(prompts[a])) for a, b in shown]
        )
        results = np.full((len(images), len(images)), np.nan)
        for (a, b), answer in zip(shown, answers, strict=True):
            verdicts = re.findall(r"image ([12]) is better", answer or "", re.IGNORECASE)
            if verdicts:
                results[a, b] = float(verdicts[-1] == "1")
                results[b, a] = 1 - results[a, b]
        return self._columns(results, members)

    def _columns(self, results: np.ndarray, members: list[np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        from flow_grpo.advantages import win_rates

        scores, missing = np.full((2, len(results)), np.nan)
        for rows in members:
            table = results[np.ix_(rows, rows)]
            verdicts = (~np.isnan(table)).sum(1)
            if len(rows) > 1:
                rates = win_rates(torch.from_numpy(np.nan_to_num(table, nan=0.5))).numpy()
                scores[rows] = np.where(verdicts > 0, rates, np.nan)
                missing[rows] = 1 - verdicts / (len(rows) - 1)
        return {self.name: scores, f"{self.name}_unparsed": missing}


def _swapped(first: np.ndarray, second: np.ndarray) -> bool:
    """Toss a coin that depends on the two pictures alone."""
    from flow_grpo import randomness

    checksums = (zlib.crc32(np.ascontiguousarray(picture)) for picture in (first, second))
    return randomness.rng(0, "judge", *checksums).random() < 0.5
