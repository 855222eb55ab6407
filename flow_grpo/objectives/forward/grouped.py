"""Losses in which a row needs the other rows of its group, on whatever ranks these are."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from flow_grpo.objectives.base import Micro, Values
from flow_grpo.objectives.forward.anchored import Forward
from flow_grpo.plan import Plan
from flow_grpo.records import Arranged, RowTable


class Grouped(Forward):
    """Deals whole groups to updates, each row on its rank."""

    replays = 1

    def arrange(self, scores: Tensor, rows: RowTable, plan: Plan, epoch: int) -> Arranged:
        arranged = super().arrange(scores, rows, plan, epoch)
        of_ranks = [rows.of_rank(rank) for rank in range(plan.world_size)]
        trained = arranged.weights > 0 if self.selects else rows.leaf
        updates = plan.in_groups(of_ranks, trained.numpy(), rows.group.numpy(), epoch)
        return replace(arranged, updates=updates)


def group_sums(
    micros: list[Micro], values: dict[str, Values], gather: Callable
) -> dict[str, Values]:
    """Sum values (M,) of each point over the group's rows of an update, on all ranks.

    Rows of weight 0 count nowhere. gather: ranks' objects to a list. The sums are rounded once, so
    that they do not depend on ranks or micro-batches.
    """
    mine, world = defaultdict(list), defaultdict(list)
    columns = [
        torch.stack([m.rows.weights, *(each for of in values.values() for each in of[i])], dim=1)
        for i, m in enumerate(micros)
    ]
    owners = [row for micro in micros for row in micro.rows.batch.owners]
    for owner, (weight, *found) in zip(owners, torch.cat(columns).tolist(), strict=True):
        if weight > 0:
            mine[owner.group].append(found)
    for part in gather(dict(mine)):
        for group, columns in part.items():
            world[group] += columns
    sums = {group: [*map(math.fsum, zip(*found, strict=True))] for group, found in world.items()}
    found = {name: [] for name in values}
    for i, micro in enumerate(micros):
        num_points = len(micro.points)
        zeros = [0.0] * num_points * len(values)
        table = [sums.get(row.group, zeros) for row in micro.rows.batch.owners]
        for n, (name, of) in enumerate(values.items()):
            columns = range(n * num_points, (n + 1) * num_points)
            found[name].append([of[i][0].new_tensor([row[c] for row in table]) for c in columns])
    return found
