"""Several rewards as one: loaded once, scored in the background, added up by weight."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pkgutil import resolve_name

import numpy as np

from flow_grpo.rewards import REWARDS


class Scorer:
    """Scores batches in one background thread while the next batch samples.

    The trained score is the weighted sum, under "avg"; a row that lacks a reward of non-zero weight
    is NaN there. A reward of weight 0 is only monitored.
    """

    def __init__(self, weights: Mapping[str, float]):
        self.weights = dict(weights)
        self._scorers = {name: resolve_name(REWARDS[name]) for name in self.weights}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward")

    def submit(self, images, prompts, metadata, references=None, group=None) -> Future:
        """Start scoring; the result is a dict of (B,) float64 arrays, "avg" among them."""
        return self._thread.submit(self.score, images, prompts, metadata, references, group)

    def score(self, images, prompts, metadata, references=None, group=None) -> dict:
        """Score now. Raises RuntimeError naming the reward that failed."""
        scores: dict[str, np.ndarray] = {}
        total = np.zeros(len(images))
        for name, scorer in self._scorers.items():
            try:
                found = scorer(images, prompts, metadata, references, group)
                found = {key: np.asarray(value, dtype=np.float64) for key, value in found.items()}
            except Exception as error:
                raise RuntimeError(f"reward {name!r} failed: {error}") from error
            wrong = any(value.shape != (len(images),) for value in found.values())
            if name not in found or wrong or any(np.isinf(value).any() for value in found.values()):
                raise RuntimeError(
                    f"reward {name!r} must return {name!r}: ({len(images)},) without infinities; "
                    f"it returned {[(key, value.shape) for key, value in found.items()]}."
                )
            if self.weights[name]:
                total = total + self.weights[name] * found[name]
            scores |= found
        return scores | {"avg": total}

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
