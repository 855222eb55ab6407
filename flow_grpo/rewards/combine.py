"""Several rewards as one: loaded once, scored in the background, added up by weight."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ml_collections
import numpy as np

from flow_grpo.rewards import loading
from flow_grpo.rewards.base import Reward
from flow_grpo.rewards.remote import servers
from flow_grpo.rewards.remote.servers import Servers, SomeFailed


class Scorer:
    """Scores batches in one background thread while the next batch samples.

    The trained score is the weighted sum, under "avg"; a row that lacks a reward of non-zero weight
    is NaN there. A reward of weight 0 is only monitored. held_out: names of further rewards, scored
    where they are asked for. masks: a reward that fails gives NaN and a warning, not an exception.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        settings: Mapping[str, Any],
        device: str = "cpu",
        *,
        where: Servers = Servers(),  # noqa: B008 - it is frozen
        held_out: Collection[str] = (),
        masks: bool = False,
    ):
        self.weights, self._masks = dict(weights), masks
        self.last_masked = ""  # what the last failure that was masked said
        self._scorers = {
            name: servers.connect(name, where)
            if name in where.urls
            else loading.load(name, settings, device)
            for name in (*self.weights, *held_out)
        }
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward")

    @classmethod
    def of(cls, config: ml_collections.ConfigDict, device: str) -> Scorer:
        """Load what a config asks for."""
        return cls(
            config.reward_fn,
            loading.settings(config),
            device,
            where=servers.of(config),
            held_out=[name for name in config.eval_reward_fn if name not in config.reward_fn],
            masks=config.on_reward_error == "mask",
        )

    @property
    def num_rewards(self) -> int:
        return len(self._scorers)

    def submit(
        self, images, prompts, metadata, references=None, group=None, held_out=False
    ) -> Future:
        """Start scoring; the result is a dict of (B,) float64 arrays, "avg" among them."""
        return self._thread.submit(
            self.score, images, prompts, metadata, references, group, held_out
        )

    def score(self, images, prompts, metadata, references=None, group=None, held_out=False) -> dict:
        """Score now. Raises RuntimeError naming the reward that failed."""
        scores: dict[str, np.ndarray] = {}
        total = np.zeros(len(images))
        for name in self._scorers if held_out else self.weights:
            try:
                found = self._score(name, images, prompts, metadata, references, group)
            except RuntimeError as error:
                if not self._masks:
                    raise
                self.last_masked = str(error)
                logging.getLogger(__name__).warning("%s: its rows are masked", error)
                known = isinstance(error.__cause__, SomeFailed)
                found = error.__cause__.scores if known else {name: np.full(len(images), np.nan)}
            if self.weights.get(name):
                total = total + self.weights[name] * found[name]
            scores |= found
        return scores | {"avg": total}

    def _score(self, name: str, images: list, *others) -> dict[str, np.ndarray]:
        try:
            found = self._scorers[name](images, *others)
            found = {key: np.asarray(value, dtype=np.float64) for key, value in found.items()}
        except Exception as error:
            raise RuntimeError(f"reward {name!r} failed: {error}") from error
        wrong = any(value.shape != (len(images),) for value in found.values())
        if name not in found or wrong or any(np.isinf(value).any() for value in found.values()):
            raise RuntimeError(
                f"reward {name!r} must return {name!r}: ({len(images)},) without infinities; "
                f"it returned {[(key, value.shape) for key, value in found.items()]}."
            )
        return found

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        for scorer in self._scorers.values():
            if isinstance(scorer, Reward):
                scorer.close()
