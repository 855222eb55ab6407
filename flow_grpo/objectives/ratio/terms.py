"""What objectives on the ratio of two log-probabilities share: keys, points, surrogate, KL."""

import ml_collections
import torch
from torch import Tensor

from flow_grpo import sde
from flow_grpo.keys import Key
from flow_grpo.objectives.base import Statistic
from flow_grpo.objectives.norms import NORM_RATIO, squared
from flow_grpo.records import Point, Rollout
from flow_grpo.sampling import Schedule, replay

# Under train, as published configs have them.
KEYS = {
    "train.clip_range": Key(1e-4, "epsilon, of the per-element mean log-ratio", least=0, most=1),
    "train.clip_range_lt": Key(None, "below 1; None: clip_range", of=float, least=0, most=1),
    "train.clip_range_gt": Key(None, "above 1; None: clip_range", of=float, least=0, most=1),
    "train.clip_nats": Key(
        0.0,
        "instead: of the whole image's log-ratio, in nats, so that one value fits all sizes, steps "
        "and kernels; 0: clip_range",
        least=0,
        most=10**6,
    ),
    "train.old_log_prob": Key(
        "rollout", "replay: scored again before the first update", choices=("rollout", "replay")
    ),
    "train.gate_tolerance": Key(
        0.025, "with replay: relative error of the velocity at the start", above=0, most=1
    ),
    "train.step_weight": Key(
        "none",
        "each step's loss times a factor, of mean 1 over the steps: std, its noise; slope, that "
        "over its mean's slope in the velocity",
        choices=("none", "std", "slope"),
    ),
    "train.beta": Key(0.0, "KL coefficient", least=0, most=10**6),
    "train.reward_kl": Key(
        0.0,
        "taken from each image's reward: times its trained steps' mean KL to the reference",
        least=0,
        most=10**6,
    ),
    "train.kl_mode": Key("kl_dt", choices=("kl_dt", "kl_true", "x", "v")),
}
STATISTICS = {
    "ratio_std": Statistic("Ratio, standard deviation", "how far the policy has moved"),
    "ratio": Statistic("Ratio, mean − 1", "0 before an epoch's first update", origin=1.0),
    "clip_high": Statistic("Clipped above", "share of ratios above the clip range"),
    "clip_low": Statistic("Clipped below", "share of ratios below the clip range"),
    "approx_kl": Statistic("Approximate KL", "mean of (log-ratio)² / 2"),
    "kl": Statistic("KL to the reference", "in the unit of train.kl_mode"),
    "policy_loss": Statistic("Policy loss", "the clipped surrogate, without the KL"),
    **NORM_RATIO,
}


def kept_points(rows: Rollout, schedule: Schedule) -> list[Point]:
    sigmas = schedule.at(rows.batch.size).sigmas
    return [
        Point(rows.latents[:, k].contiguous(), sigmas[steps], step=steps, column=k)
        for k, steps in enumerate(rows.steps.unbind(1))
    ]


def clip_bounds(
    train: ml_collections.ConfigDict, of_a_nat: float | Tensor
) -> tuple[float | Tensor, float | Tensor]:
    """Return how far the ratio may fall below 1 and rise above it, numbers or (B,).

    of_a_nat: the ratio's logarithm where the true one of the whole image is 1 nat, as sde.of_a_nat.
    """
    if train.clip_nats:
        return train.clip_nats * of_a_nat, train.clip_nats * of_a_nat
    below, above = train.clip_range_lt, train.clip_range_gt
    return (train.clip_range if side is None else side for side in (below, above))


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, below: float | Tensor, above: float | Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return PPO's clipped loss (B,) of each row and its statistics (arXiv:1707.06347).

    The ratio is clipped to [1 - below, 1 + above].
    """
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - below, 1 + above)
    value = torch.maximum(-advantages * ratio, -advantages * clipped)
    stats = ratio_stats(log_ratio, value)
    stats["clip_high"] = (stats["ratio"] > 1 + above).float()
    stats["clip_low"] = (stats["ratio"] < 1 - below).float()
    return value, stats


def ratio_stats(log_ratio: Tensor, value: Tensor) -> dict[str, Tensor]:
    seen = log_ratio.detach()
    return {"ratio": seen.exp(), "approx_kl": 0.5 * seen**2, "policy_loss": value.detach()}


def kl(
    mode: str,
    schedule: Schedule,
    rows: Rollout,
    point: Point,
    step: sde.Step,
    velocity: Tensor,
    reference: Tensor,
) -> Tensor:
    """Measure how far a step is from that of the reference's velocity at the same state, (B,).

    mode: "kl_true" is the Gaussians' KL per element, "kl_dt" that times sigma - sigma_next (the
    scale of published betas), "x" and "v" squared distances of means and of velocities. step: that
    of `velocity`, which alone has a gradient.
    """
    if mode == "v":
        return squared(velocity - reference)
    mean = replay(schedule, rows, point.column, reference).mean
    if mode == "x":
        return squared(step.mean - mean)
    divergence = sde.mean_kl(step.mean, mean, step.std)
    if mode == "kl_dt" and sde.KERNELS[schedule.kind].has_variance:
        sigmas = schedule.at(rows.batch.size).sigmas
        divergence = divergence * (point.sigma - sigmas[rows.next_steps[:, point.column]])
    return divergence


def step_weights(kind: str, schedule: Schedule) -> Tensor | None:
    """Return a factor for the loss of each step but the last, (N - 1,) of mean 1; None: no factor.

    kind: of train.step_weight. "std": each step's std (TempFlow-GRPO, arXiv:2508.04324); "slope":
    std / |d mean / d velocity|, what a log-prob's slope in the velocity is divided by (Flash-GRPO).
    """
    if kind == "none":
        return None
    sigmas = schedule.sigmas
    zeros = torch.zeros(schedule.num_steps - 1, 1, device=sigmas.device)
    still, moved = (
        sde.step(
            schedule.kind,
            velocity,
            zeros,
            sigmas[:-2],
            sigmas[1:-1],
            schedule.noise_level,
            sigma_guard=sigmas[1],
            noise=zeros,
        )
        for velocity in (zeros, zeros + 1)
    )
    weights = still.std.flatten()
    if kind == "slope":
        weights = weights / (moved.mean - still.mean).flatten().abs()
    return weights / weights.mean()
