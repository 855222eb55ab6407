"""What objectives on the ratio of two log-probabilities share: keys, points, surrogate, KL."""

import torch
from torch import Tensor

from flow_grpo import sde
from flow_grpo.keys import Key
from flow_grpo.objectives.base import Statistic
from flow_grpo.records import Point, Rollout
from flow_grpo.sampling import Schedule, replay

# Under train, as published configs have them.
KEYS = {
    "train.clip_range": Key(1e-4, "epsilon, of the per-element mean log-ratio", least=0, most=1),
    "train.old_log_prob": Key(
        "rollout", "replay: scored again before the first update", choices=("rollout", "replay")
    ),
    "train.gate_tolerance": Key(
        0.025, "with replay: relative error of the velocity at the start", above=0, most=1
    ),
    "train.step_weight": Key(
        "none", "std: each step's loss times its std over the mean std", choices=("none", "std")
    ),
    "train.beta": Key(0.0, "KL coefficient", least=0, most=10**6),
    "train.kl_mode": Key("kl_dt", choices=("kl_dt", "kl_true", "x", "v")),
}
STATISTICS = {
    "ratio_std": Statistic("Ratio, standard deviation", "how far the policy has moved"),
    "ratio": Statistic("Ratio, mean − 1", "0 before an epoch's first update", origin=1.0),
    "clip_high": Statistic("Clipped above", "share of ratios above 1 + clip_range"),
    "clip_low": Statistic("Clipped below", "share of ratios below 1 − clip_range"),
    "approx_kl": Statistic("Approximate KL", "mean of (log-ratio)² / 2"),
    "kl": Statistic("KL to the reference", "in the unit of train.kl_mode"),
    "policy_loss": Statistic("Policy loss", "the clipped surrogate, without the KL"),
}


def kept_points(rows: Rollout, schedule: Schedule) -> list[Point]:
    return [
        Point(rows.latents[:, k].contiguous(), schedule.sigmas[steps], step=steps, column=k)
        for k, steps in enumerate(rows.steps.unbind(1))
    ]


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, clip_range: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return PPO's clipped loss (B,) of each row and its statistics (arXiv:1707.06347)."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    value = torch.maximum(-advantages * ratio, -advantages * clipped)
    seen = ratio.detach()
    stats = {
        "ratio": seen,
        "clip_high": (seen > 1 + clip_range).float(),
        "clip_low": (seen < 1 - clip_range).float(),
        "approx_kl": 0.5 * log_ratio.detach() ** 2,
        "policy_loss": value.detach(),
    }
    return value, stats


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
        return ((velocity - reference) ** 2).flatten(1).mean(1)
    mean = replay(schedule, rows, point.column, reference).mean
    if mode == "x":
        return ((step.mean - mean) ** 2).flatten(1).mean(1)
    divergence = sde.mean_kl(step.mean, mean, step.std)
    if mode == "kl_dt" and sde.KERNELS[schedule.kind].has_variance:
        divergence = divergence * (point.sigma - schedule.sigmas[rows.next_steps[:, point.column]])
    return divergence


def std_weights(schedule: Schedule) -> Tensor:
    """Return each step's std over the mean std of all steps but the last, (N - 1,)."""
    sigmas = schedule.sigmas
    zeros = torch.zeros(schedule.num_steps - 1, 1, device=sigmas.device)
    place, guard = (zeros, zeros, sigmas[:-2], sigmas[1:-1]), sigmas[1]
    step = sde.step(schedule.kind, *place, schedule.noise_level, sigma_guard=guard, noise=zeros)
    return step.std.flatten() / step.std.mean()
