"""Reward hacking: the trained reward rises while rewards that it was not trained on fall."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flow_grpo.evaluation.intervals import paired_interval
from flow_grpo.evaluation.tables import read_scores, write_scores
from flow_grpo.prompts import Prompt

SPAN = 2  # evaluations that lie between the two compared: this one and the second before it


def write(
    folder: Path, num_updates: int, scores: dict[str, np.ndarray], prompts: list[Prompt]
) -> None:
    """Keep an evaluation's scores, a line a prompt, in evaluations/<step>.csv."""
    path = _path(folder, num_updates)
    path.parent.mkdir(exist_ok=True)
    write_scores(path, scores, prompts)


def fallen(
    folder: Path,
    steps: list[int],
    scores: dict[str, np.ndarray],
    held_out: list[str],
    prompts: list[Prompt],
) -> list[str]:
    """Name the held-out rewards that fell while the trained one rose, with their intervals.

    steps: of the evaluations before this one, the latest last. The evaluation SPAN before is
    compared with this one, prompt by prompt from the same noise. The alarm is raised where the
    paired 95 % interval of the change lies above 0 for "avg" and below 0 for a held-out reward.
    """
    if len(steps) < SPAN or not (path := _path(folder, steps[-SPAN])).is_file():
        return []
    (were, before), texts = read_scores(path), [prompt.text for prompt in prompts]
    if were != texts:  # resumed with other prompts
        return []

    def change(name: str) -> tuple[float, float]:
        """(nan, nan), which compares as False, where an evaluation lacks the score."""
        earlier = before.get(name, np.full(len(texts), np.nan))
        return paired_interval(earlier, scores[name], texts)

    if not change("avg")[0] > 0:
        return []
    changes = {name: change(name) for name in held_out}
    return [f"{n} [{low:+.3g}, {high:+.3g}]" for n, (low, high) in changes.items() if high < 0]


def _path(folder: Path, num_updates: int) -> Path:
    return folder / "evaluations" / f"{num_updates:06d}.csv"
