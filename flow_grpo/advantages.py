"""Scores to group-relative advantages, in fp64; a group is the images of one prompt.

NaN, "could not be scored", counts nowhere and gets 0. No bit depends on the order of the rows.
"""

import torch
from torch import Tensor


def group_advantages(
    scores: Tensor,
    group: Tensor,
    *,
    std: str = "global",
    epsilon: float = 1e-4,
    unbiased: bool = False,
) -> Tensor:
    """Centre each score on its group's mean and divide by a standard deviation.

    scores: (N,), NaN where missing. group: (N,) int64. std: of "group" (GRPO, arXiv:2402.03300), of
    all, "global" (Flow-GRPO, arXiv:2505.05470), or "none" (Dr.GRPO, arXiv:2503.20783); of the
    population, or unbiased; plus epsilon. Returns (N,) float64, exactly 0 where a group's scores
    are equal (to 1e-8 relative). If no group has a second row, the whole batch is the group.
    """
    assert std in ("group", "global", "none"), std
    present = ~torch.isnan(scores)
    values = scores[present].double()
    centred, group_std, count = _centre(values, _group_index(group)[present])
    if std == "global":
        group_std, count = _std(values), values.new_tensor(len(values))
    if unbiased:
        group_std = group_std * torch.sqrt(count / (count - 1).clamp(min=1))
    if std != "none":
        centred = centred / (group_std + epsilon)
    return _restore(centred, present)


def gdpo_advantages(
    scores: dict[str, Tensor], weights: dict[str, float], group: Tensor, *, floor: float = 1e-6
) -> Tensor:
    """Normalise each reward within its groups, add them up by weight, and normalise over the batch.

    scores: (N,) for each key of weights (GDPO, arXiv:2601.05242); a row that misses one counts in
    none. floor: smallest std that is divided by. Returns (N,) float64.
    """
    names = sorted(weights)
    table = torch.stack([scores[name].double() for name in names])  # (rewards, N)
    present = ~torch.isnan(table).any(0)
    index = _group_index(group)[present]
    total = torch.zeros_like(table[0, present])
    for name, values in zip(names, table[:, present], strict=True):
        centred, group_std, _ = _centre(values, index)
        total += weights[name] * centred / group_std.clamp(min=floor)
    # Every group of `total` sums to 0, so the batch's mean is 0 as well: subtracting its rounding
    # error would only spoil the exact zeros.
    return _restore(total / _std(total).clamp(min=floor), present)


def zero_std_fraction(scores: Tensor, group: Tensor) -> float:
    """Give the fraction of groups that teach nothing, as their scores are all equal or missing."""
    num_groups = int(_group_index(group).max()) + 1
    return (num_groups - num_unequal(scores, group)) / num_groups


def num_unequal(scores: Tensor, group: Tensor) -> int:
    """Count the groups whose scores (N,) are not all equal or missing."""
    index = _group_index(group)
    present = ~torch.isnan(scores)
    centred, *_ = _centre(scores[present].double(), index[present])
    return len(index[present][centred != 0].unique())


def _group_index(group: Tensor) -> Tensor:
    """Number the groups from 0; all rows are one group if no group has a second row."""
    ids, index = torch.unique(group, return_inverse=True)
    return torch.zeros_like(index) if len(ids) == len(group) else index


def _centre(values: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract the group means, exactly 0 in constant groups; with the rows' stds and counts."""
    assert torch.isfinite(values).all(), "an infinite score"
    num_groups = int(index.max()) + 1 if len(index) else 0
    empty = values.new_zeros(num_groups)
    count = torch.bincount(index, minlength=num_groups)
    mean = _group_sum(values, index, num_groups) / count
    largest = empty.scatter_reduce(0, index, values, "amax", include_self=False)
    smallest = empty.scatter_reduce(0, index, values, "amin", include_self=False)
    constant = largest - smallest <= 1e-8 * mean.abs().clamp(min=1)
    centred = torch.where(constant[index], 0, values - mean[index])
    std = torch.sqrt(_group_sum(centred**2, index, num_groups) / count)
    return centred, std[index], count[index].double()


def _group_sum(values: Tensor, index: Tensor, num_groups: int) -> Tensor:
    """Sum within groups, smallest value first: no bit depends on the order of the rows."""
    order = values.argsort()
    return values.new_zeros(num_groups).index_add_(0, index[order], values[order])


def _std(values: Tensor) -> Tensor:
    values = values.sort().values
    return torch.sqrt(torch.mean((values - values.mean()) ** 2))


def _restore(values: Tensor, present: Tensor) -> Tensor:
    """Put the present rows back among the missing ones, which get 0."""
    return values.new_zeros(present.shape).masked_scatter(present, values)
