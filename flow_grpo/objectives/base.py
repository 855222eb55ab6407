"""What an objective declares and gives to each stage of an epoch. It holds no loop, does no I/O."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import ml_collections
import numpy as np
from torch import Tensor

from flow_grpo import rollouts
from flow_grpo.advantages import group_advantages
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.keys import Key
from flow_grpo.objectives import credit
from flow_grpo.plan import Passes, Plan
from flow_grpo.randomness import Randomness
from flow_grpo.records import Arranged, Loss, Point, Rollout, RowTable
from flow_grpo.rollouts import Call, Calls, StepsOf
from flow_grpo.sampling import Schedule

Values = list[list[Tensor]]  # of each micro-batch, of each of its points: (M, ...)
# (point, guidance=None) -> (M, ...) fp32; (micros, weights="policy", guidance=None) -> Values, by
# weights that are loaded once, the policy's or a declared snapshot's. None: training's guidance.
Velocity, Predict = Callable[..., Tensor], Callable[..., Values]


@dataclass
class Micro:
    """One micro-batch: M rows, the points at which they train, what is known there."""

    rows: Rollout
    points: list[Point]
    velocity: Velocity  # by the weights that are loaded, (M, ...) fp32
    trained: list[Tensor | None]  # of each point: the rows of weight above 0; None: all
    known: list[dict[str, Tensor]] | None = None  # of each point, from prepare(): name -> (M, ...)


class Snapshots(Protocol):
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

    keys: ClassVar[dict[str, Key]] = {}  # of the config, that only it reads: "section.key"
    keeps: ClassVar[Collection[str]] = ()  # of sampling.KEPT, for each stochastic step
    draws_points: ClassVar[bool] = False  # points() gives others in each inner epoch
    selects: bool = False  # arrange() chooses rows by their scores
    reward_kl: float = 0.0  # times reference_kl(), it is taken from the scores
    gather: Callable[[Any], list] = staticmethod(lambda value: [value])  # of all ranks; set by Run
    snapshots: tuple[str, ...] = ()  # names of the copies of the weights to hold
    # For the report, by their names in metrics; one that is not here is drawn under its name.
    statistics: ClassVar[dict[str, Statistic]] = {}

    @classmethod
    def check(cls, config: ml_collections.ConfigDict, family: type[PatchedPipeline]) -> None:
        """Raise ValueError, before weights are loaded, if this objective can't run so."""

    def __init__(self, config: ml_collections.ConfigDict, schedule: Schedule):
        """config: the run's. schedule: how the rollout was drawn."""
        self.schedule, self.sample, self.train = schedule, config.sample, config.train
        self.adv_clip_max = config.train.adv_clip_max
        self.std = config.sample.advantage_std
        self.std = self.std or ("global" if config.sample.global_std else "group")
        of_nodes = self.keeps and config.sample.branching in ("strides", "tree")
        some = config.train.drop_equal_groups or config.train.best_and_worst
        self.selects = bool(self.selects or of_nodes or some)
        if config.reward_aggregation == "gdpo":
            self.std = "none"  # its scores are normalised already

    def samples_with(self, epoch: int, num_updates: int) -> str:
        """Name the weights that roll out: "policy", or a snapshot; of saved numbers alone."""
        return "policy"

    def rollout(self, calls: Calls, steps_of: StepsOf) -> list[Call]:
        """Turn a rank's rows into calls of denoise() (rollouts.py); the same on every rank."""
        branching = rollouts.BRANCHINGS[self.sample.branching]
        size = self.sample.num_image_per_prompt
        return branching(calls, steps_of, self.schedule.num_steps, size)

    def reference_kl(self, micros: list[Micro], predict: Predict) -> list[Tensor]:
        """Measure how far each leaf was drawn from where the reference would have, (M,) each."""
        raise NotImplementedError

    def arrange(self, scores: Tensor, rows: RowTable, plan: Plan, epoch: int) -> Arranged:
        """Say which rows train in which update, with which advantages and weights.

        A pure function of all ranks' rows. scores: (N,) fp64, NaN where missing and for rows that
        are no leaves. By default all leaves train, in their order, with targets() of their scores;
        of an objective on steps all rows that have one (credit.py).
        """
        trained = (rows.steps >= 0).any(1) if self.keeps else rows.leaf
        advantages, weights = scores.new_zeros(2, len(rows))
        cells, values = credit.peers(rows), credit.mean_below(scores, rows)
        advantages[trained], weights[trained] = self.targets(values[trained], cells[trained])
        if self.keeps and (lone := credit.scores_for_parent(rows)).any():
            above = rows.parent[lone]
            parts, present = self.targets(scores[lone], cells[lone])
            advantages[trained] = 0
            advantages.index_add_(0, above, parts)
            weights[above[present == 0]] = 0
        if not self.selects:
            of_ranks = [rows.of_rank(rank) for rank in range(plan.world_size)]
            return Arranged(plan.in_order(of_ranks, epoch), advantages, weights)
        weights[~credit.chosen(self.train, values, advantages, cells)] = 0
        if self.train.tree_depths:
            weights[~credit.depth_window(self.train, rows, epoch)] = 0
        of_ranks = [rows.of_rank(rank, trained) for rank in range(plan.world_size)]
        alone = [[np.array([n]) for n in mine if weights[n] > 0] for mine in of_ranks]
        return Arranged(plan.in_sets(alone, of_ranks, epoch), advantages, weights)

    def targets(self, scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Turn all ranks' scores (N,), NaN where missing, into (advantages, weights), (N,) fp64.

        An update's loss is the mean weighted by these.
        """
        unbiased = self.sample.unbiased_std
        advantages = group_advantages(scores, group, std=self.std, unbiased=unbiased)
        return advantages.clamp(-self.adv_clip_max, self.adv_clip_max), (~scores.isnan()).double()

    def points(self, rows: Rollout, randomness: Randomness) -> list[Point]:
        """List where the velocity of these rows is needed; equally many points for any rows."""
        raise NotImplementedError

    def prepare(self, micros: list[Micro], predict: Predict) -> dict[str, Values]:
        """Compute what belongs to the weights that sampled, before the epoch's first update.

        micros: the epoch's, each once, or once an inner epoch if it draws_points. What is returned
        reaches loss() under its name.
        """
        return {}

    def freeze(self, micros: list[Micro], predict: Predict) -> dict[str, Values]:
        """Compute what an update needs and does not train; once an update, which it sees whole."""
        return {}

    def loss(self, velocity: Tensor, known: dict[str, Tensor], rows: Rollout, point: Point) -> Loss:
        """Return the unreduced loss of each row. known: of prepare() and freeze(), (M, ...)."""
        raise NotImplementedError

    def passes(self, num_kept: float) -> Passes:
        """Count an image's forward passes in an epoch. num_kept: stochastic steps, as a mean."""
        return Passes(num_kept, 0, 0)

    def gate_limits(self) -> dict[str, float]:
        """Bound the figures of training/gate.py with which a run may start."""
        return {}

    def after_update(
        self, snapshots: Snapshots, num_updates: int, metrics: dict[str, float]
    ) -> None:
        """Move snapshots after an optimizer step.

        num_updates: since the run's start. metrics: the step's, the same on all ranks.
        """

    def after_epoch(self, snapshots: Snapshots, num_updates: int) -> None:
        """Move snapshots after an epoch."""
