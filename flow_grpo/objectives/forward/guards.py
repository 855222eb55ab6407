"""Which images' rewards are not to be trusted (GARDO, arXiv:2512.24138)."""

import torch
from torch import Tensor


def win_rate(scores: Tensor, group: Tensor) -> Tensor:
    """Return the share of its group's scored rows that each row beats, ties half, (N,) fp64.

    scores: (N,), NaN where missing. NaN for a row that is missing or has no peer.
    """
    same = (group[:, None] == group) & ~scores.isnan()
    same.fill_diagonal_(False)
    ahead = torch.sign(scores[:, None] - scores).nan_to_num() / 2 + 0.5
    rate = (ahead.double() * same).sum(1) / same.sum(1)
    return torch.where(scores.isnan(), torch.nan, rate)


def overrated(scores: Tensor, others: list[Tensor], group: Tensor, share: float) -> Tensor:
    """Mark the share of rows whose win rate most exceeds the mean of those by other rewards.

    scores: (N,), the trained ones. others: (N,) each. Returns (N,) fp64, 1 where it is marked.
    """
    rates = [win_rate(other, group) for other in others]
    excess = win_rate(scores, group) - torch.stack(rates).mean(0)
    present = int((~excess.isnan()).sum())
    order = torch.argsort(excess.nan_to_num(-torch.inf), descending=True, stable=True)
    marked = torch.zeros_like(excess)
    marked[order[: round(share * present)]] = 1
    return marked
