"""What a rank has drawn in an epoch: its rows by size, their images, their scores to come."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from flow_grpo.records import Rollout, Size
from flow_grpo.rewards.combine import Scoring
from flow_grpo.training.arrange import take_rows


class Ranked:
    """The scores of a prompt's own answers: the earlier is the better."""

    def __init__(self, members: list[int]):
        self._scores = -np.array(members, dtype=np.float64)

    def result(self, patience_s: float) -> dict[str, np.ndarray]:
        return {"avg": self._scores}


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
    scoring: Scoring | Ranked | None  # of the leaves, under way
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
