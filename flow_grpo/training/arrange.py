"""Between scoring and the updates: who trains when, and this rank's share of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flow_grpo import randomness
from flow_grpo.objectives.base import Objective
from flow_grpo.plan import Plan
from flow_grpo.records import Arranged, Rollout, RowTable, Size
from flow_grpo.rewards.combine import Scoring


class Drawn(NamedTuple):
    """Rows of one size."""

    rollout: Rollout  # N rows
    numbers: np.ndarray  # (N,) int64, ascending: theirs among this rank's rows

    @staticmethod
    def by_size(parts: Iterable[Drawn]) -> list[Drawn]:
        """Put the parts of each size together."""
        found: dict[Size, list[Drawn]] = {}
        for part in parts:
            found.setdefault(part.rollout.batch.size, []).append(part)
        return [
            Drawn(Rollout.cat([r for r, _ in alike]), np.concatenate([n for _, n in alike]))
            if len(alike) > 1
            else alike[0]
            for alike in found.values()
        ]

    @staticmethod
    def in_turn(rollouts: Iterable[Rollout]) -> list[Drawn]:
        """Number the rows of a rank's calls."""
        parts, num_rows = [], 0
        for rollout in rollouts:
            parts.append(Drawn(rollout, np.arange(num_rows, num_rows + len(rollout))))
            num_rows += len(rollout)
        return Drawn.by_size(parts)


@dataclass
class Sampled:
    """This rank's part of an epoch's rollout."""

    parts: list[Drawn]  # one for each size
    images: list[np.ndarray]  # of the leaves, uint8 ([F,] H, W, 3)
    scoring: Scoring | None  # of the leaves, under way; or collect.Ranked of given ones
    for_gate: list[Rollout]  # each size's first rows, with the velocities predicted for them
    seconds_a_step: float = 1.0  # of a call
    first_row: int = 0  # the number of its first row among all ranks'

    @property
    def rollout(self) -> Rollout:
        """All rows, if they have one size."""
        ((rollout, _),) = self.parts
        return rollout

    def with_more(self, more: Sampled) -> Sampled:
        """Put further rows behind these, whose scores are there."""
        num_rows, parts = sum(len(part.rollout) for part in self.parts), list(self.parts)
        for rollout, numbers in more.parts:
            parent = rollout.parent.clone()
            parent[parent[:, 0] >= 0, 0] += num_rows
            parts.append(Drawn(replace(rollout, parent=parent), numbers + num_rows))
        images = self.images + more.images
        return replace(self, parts=Drawn.by_size(parts), images=images, scoring=None)

    def rows(self, micro: np.ndarray) -> Rollout:
        """Return a micro-batch, which is of one size; a fill weighs 0."""
        numbers = np.where(micro < 0, ~micro, micro) - self.first_row
        rollout, held = next(part for part in self.parts if numbers[0] in part.numbers)
        local = np.searchsorted(held, numbers)
        return take_rows(rollout, np.where(micro < 0, ~local, local), first=0)


def arrange(
    objective: Objective, scores: Tensor, rows: RowTable, plan: Plan, epoch: int, shuffle: bool
) -> Arranged:
    """Let the objective arrange all ranks' rows; the same on every rank.

    scores: (N,) fp64. shuffle: a control that deals advantages and weights, or the scores of an
    objective that selects by them, to random leaves.
    """
    if rows.sizes is not None and len(rows.sizes.unique()) > 1:
        plan = replace(plan, row_sizes=rows.sizes.numpy())
    dealt = torch.arange(len(rows))  # the row whose outcome each gets
    if shuffle:
        leaves = torch.nonzero(rows.leaf).flatten()
        order = list(range(len(leaves)))
        randomness.rng(plan.seed, "shuffle", epoch).shuffle(order)
        dealt[leaves] = leaves[order]
    if objective.selects:
        arranged = objective.arrange(scores[dealt], rows, plan, epoch)
    else:
        arranged = objective.arrange(scores, rows, plan, epoch)
        arranged.advantages, arranged.weights = arranged.advantages[dealt], arranged.weights[dealt]
    check(arranged, rows, plan)
    return arranged


def check(arranged: Arranged, rows: RowTable, plan: Plan) -> None:
    """Raise AssertionError where ranks would make unequal calls, or a row is another rank's."""
    for update in (update for inner in arranged.updates for update in inner):
        assert len(update) == plan.world_size, "an update needs micro-batches for every rank"
        sizes = [[len(micro) for micro in of_rank] for of_rank in update]
        assert all(each == sizes[0] for each in sizes), f"ranks' micro-batches differ: {sizes}"
        for rank, of_rank in enumerate(update):
            for micro in of_rank:
                numbers = _numbers(micro)
                assert (rows.rank[numbers] == rank).all(), "a row stays on its rank"
                alike = rows.sizes is None or len(rows.sizes[numbers].unique()) == 1
                assert alike, "a micro-batch mixes sizes"


def total_weight(arranged: Arranged, update: list[list[np.ndarray]], num_points: int) -> float:
    """Sum the weights of an update's rows of all ranks, over all their points."""
    nothing = np.empty(0, dtype=np.int64)
    numbers = np.concatenate([nothing, *(micro for of_rank in update for micro in of_rank)])
    weights = arranged.weights[numbers[numbers >= 0]]
    return weights.sum().item() * (num_points if weights.ndim == 1 else 1)


def take_rows(rollout: Rollout, micro: np.ndarray, first: int) -> Rollout:
    """Return a micro-batch of a rollout whose first row has the number `first`; a fill weighs 0."""
    fill, local = micro < 0, _numbers(micro) - first
    if (np.diff(local) == 1).all() and not fill.any():
        return rollout.rows(slice(int(local[0]), int(local[-1]) + 1))  # views, no copies
    rows = rollout.rows(torch.from_numpy(local))
    rows.weights[torch.from_numpy(np.flatnonzero(fill))] = 0
    return rows


def trained_rows(arranged: Arranged, micro: np.ndarray, column: int) -> Tensor | None:
    """List a micro-batch's rows of weight above 0 at one point; None: all of them."""
    weights = arranged.weights[_numbers(micro)]
    if weights.ndim > 1:
        weights = weights[:, column]
    kept = (weights > 0) & torch.from_numpy(micro >= 0)
    return None if kept.all() else torch.nonzero(kept).flatten()


def _numbers(micro: np.ndarray) -> np.ndarray:
    return np.where(micro < 0, ~micro, micro)
