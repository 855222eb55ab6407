"""What an objective declares and gives. It holds no loop and does no I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple, Protocol

import ml_collections
from torch import Tensor

from flow_grpo.advantages import group_advantages
from flow_grpo.randomness import Randomness
from flow_grpo.records import Loss, Point, Rollout
from flow_grpo.sampling import Schedule

Predict = Callable[[Point], Tensor]  # the policy's velocity (B, ...) fp32, without a gradient
Reduce = Callable[[Tensor], Tensor]  # the sum over ranks


class Frozen(Protocol):
    """Copies of the trained weights (training/snapshots.py), as an objective may move them."""

    def update(self, name: str, decay: float) -> None:
        """Set the copy to decay x copy + (1 - decay) x policy."""


class Statistic(NamedTuple):
    """What the report calls a value of Loss.stats: it draws one line per denoising step."""

    title: str
    note: str = ""
    origin: float = 0.0  # drawn as the difference from it


class Objective:
    """One algorithm. The methods stand in the order in which the loop calls them."""

    samples_with: ClassVar[str] = "policy"  # whose weights roll out: policy | old | ema | reference
    keeps: ClassVar[str] = "steps"  # of a rollout: "steps" (states and log-probs) | "final"
    snapshots: tuple[str, ...] = ()  # frozen copies to hold: "old", "reference"
    anchors: tuple[str, ...] = ()  # those whose velocity loss() needs at every point
    # For the report, by their names in metrics; one that is not here is drawn under its name.
    statistics: ClassVar[dict[str, Statistic]] = {}

    @classmethod
    def check(cls, config: ml_collections.ConfigDict) -> None:
        """Raise ValueError, before weights are loaded, if this objective can't run so."""

    def __init__(self, config: ml_collections.ConfigDict, schedule: Schedule):
        """config: the run's. schedule: how the rollout was drawn."""
        self.schedule = schedule
        self.adv_clip_max = config.train.adv_clip_max
        self.std = "global" if config.sample.global_std else "group"
        if config.reward_aggregation == "gdpo":
            self.std = "none"  # its scores are normalised already

    def targets(self, scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Turn the scores of all ranks into (advantages, weights), by default group-relative.

        scores: (N,) fp64, NaN where missing. group: (N,) int64. Returns (N,) fp64 each; a row of
        weight 0 is not trained, and the loss of an update is its mean weighted by these.
        """
        advantages = group_advantages(scores, group, std=self.std)
        return advantages.clamp(-self.adv_clip_max, self.adv_clip_max), (~scores.isnan()).double()

    def prepare(self, micro: Rollout, predict: Predict) -> None:
        """Freeze what belongs to the epoch's first weights; once a micro-batch."""

    def points(self, micro: Rollout, randomness: Randomness) -> list[Point]:
        """List where the velocity of these rows is needed; equally many points for any rows."""
        raise NotImplementedError

    def loss(
        self,
        velocity: Tensor,
        anchors: dict[str, Tensor],
        micro: Rollout,
        point: Point,
        reduce: Reduce,
    ) -> Loss:
        """Return the unreduced loss of each row. `reduce` is the only collective allowed here."""
        raise NotImplementedError

    def mismatch(self, velocity: Tensor, micro: Rollout, point: Point) -> Tensor | None:
        """Measure how far the unchanged policy, in training, is from the one that sampled; (B,)."""
        return None

    @property
    def tolerance(self) -> float:
        """The largest mismatch a run may start with."""
        return 0.0

    def after_update(self, frozen: Frozen, num_updates: int) -> None:
        """Move snapshots after an optimizer step; num_updates counts from the run's start."""

    def after_epoch(self, frozen: Frozen, num_updates: int) -> None:
        """Move snapshots after an epoch."""
