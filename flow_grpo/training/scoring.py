"""From the scores of all ranks to the advantage and weight of each row."""

from __future__ import annotations

import math

import ml_collections
import numpy as np
import torch
from torch import Tensor

from flow_grpo import advantages, randomness
from flow_grpo.evaluation import diversity
from flow_grpo.records import Rollout
from flow_grpo.training.run import Run


def weigh(run: Run, rollout: Rollout, scores: dict[str, np.ndarray]) -> dict[str, float]:
    """Turn the scores of all ranks into advantages and weights for this rank's rows."""
    gather, device = run.ranks.gather, run.ranks.device
    group = gather(rollout.batch.group.to(device)).cpu()
    world = {k: gather(torch.from_numpy(v).to(device)).cpu() for k, v in scores.items()}
    advantage, weight = run.objective.targets(combine(run.config, world, group), group)
    if run.config.train.shuffle_advantages:
        order = list(range(len(advantage)))
        randomness.rng(run.config.seed, "shuffle", run.epoch).shuffle(order)
        advantage, weight = advantage[order], weight[order]
    first = run.ranks.rank * len(rollout)
    mine = slice(first, first + len(rollout))
    rollout.advantages = advantage[mine].float().to(device)
    rollout.weights = weight[mine].float().to(device)

    metrics = {f"reward/{name}": values.nanmean().item() for name, values in world.items()}
    small = gather(torch.from_numpy(diversity.thumbnails(rollout.images)).to(device)).cpu()
    spread = diversity.diversity(small.numpy(), group.numpy())
    if not math.isnan(spread):  # a group has more than one picture
        metrics["diversity"] = spread
    average = world["avg"]
    present = average[~average.isnan()]
    return metrics | {
        "reward/avg_std": present.std(correction=0).item(),
        "reward/missing": average.isnan().sum().item(),
        "reward/zero_std_fraction": advantages.zero_std_fraction(average, group),
        "advantage/abs_mean": advantage.abs().mean().item(),
    }


def combine(config: ml_collections.ConfigDict, scores: dict[str, Tensor], group: Tensor) -> Tensor:
    """Return the one score (N,) that is trained, of all ranks; NaN where a reward is missing.

    config.reward_aggregation "gdpo": each reward normalised in its groups first; the objective then
    only centres it.
    """
    average = scores["avg"]
    if config.reward_aggregation == "sum":
        return average
    weights = {name: weight for name, weight in config.reward_fn.items() if weight}
    combined = advantages.gdpo_advantages({name: scores[name] for name in weights}, weights, group)
    return torch.where(average.isnan(), average, combined)
