"""Which rows are compared, what a step that branches is worth, and which rows are left out."""

import ml_collections
import torch
from torch import Tensor

from flow_grpo.records import RowTable


def peers(rows: RowTable) -> Tensor:
    """Number the sets of rows whose scores are compared, (N,) int64.

    Those of a group whose first trained step is the same. A leaf without one has that of its
    parent, and its peers have the same place among their siblings.
    """
    if not rows.steps.shape[1]:
        return rows.group
    step, lone = rows.steps[:, 0].clone(), scores_for_parent(rows)
    step[lone] = step[rows.parent[lone]]
    place = torch.where(lone, rows.branch, -1)
    return torch.stack([rows.group, step, place], dim=1).unique(dim=0, return_inverse=True)[1]


def scores_for_parent(rows: RowTable) -> Tensor:
    """Tell which leaves only score the step of the row that they go on from, (N,) bool."""
    has_step = (rows.steps >= 0).any(1)
    return rows.leaf & ~has_step & has_step[rows.parent] & (rows.parent >= 0)


def mean_below(scores: Tensor, rows: RowTable) -> Tensor:
    """Return a leaf's score, and for another row the mean of the leaves below it, (N,) fp64.

    NaN where no leaf has a score.
    """
    scored = torch.nonzero(rows.leaf & ~scores.isnan()).flatten()
    total, count = torch.zeros_like(scores), torch.zeros_like(scores)
    at, values = scored, scores[scored]
    while len(at):
        total.index_add_(0, at, values)
        count.index_add_(0, at, torch.ones_like(values))
        above = rows.parent[at]
        at, values = above[above >= 0], values[above >= 0]
    return total / count


def depth_window(train: ml_collections.ConfigDict, rows: RowTable, epoch: int) -> Tensor:
    """Tell which rows of a tree train in an epoch by their depth, (N,) bool (arXiv:2509.06040).

    train.tree_depths consecutive depths, that move on by one every train.tree_dwell epochs.
    """
    has_step = (rows.steps >= 0).any(1)
    depth, above = torch.full_like(rows.group, -1), torch.arange(len(rows))
    while (there := above >= 0).any():
        depth[there] += has_step[above[there]]
        above = torch.where(there, rows.parent[above], -1)
    num_depths = int(depth.max()) + 1
    first = epoch // train.tree_dwell % max(num_depths - train.tree_depths + 1, 1)
    return (depth >= first) & (depth < first + train.tree_depths)


def chosen(
    train: ml_collections.ConfigDict, values: Tensor, advantages: Tensor, peers: Tensor
) -> Tensor:
    """Tell which rows train, (N,) bool: train.drop_equal_groups and train.best_and_worst.

    values, advantages: (N,) fp64. peers: (N,) int64, of which both keys are meant.
    """
    kept = torch.ones_like(peers, dtype=torch.bool)
    number = peers.unique(return_inverse=True)[1]
    if train.drop_equal_groups:
        kept &= torch.isin(number, number[advantages != 0])
    if most := train.best_and_worst:
        order = torch.argsort(values, stable=True)  # NaN is last
        order = order[torch.argsort(number[order], stable=True)]
        for rows in order.split(torch.bincount(number).tolist()):
            rows = rows[~values[rows].isnan()]
            kept[rows[most : max(most, len(rows) - most)]] = False
    return kept
