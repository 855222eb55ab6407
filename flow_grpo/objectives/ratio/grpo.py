"""Flow-GRPO (arXiv:2505.05470): a clipped policy gradient over the trained denoising steps."""

from __future__ import annotations

import torch
from torch import Tensor

from flow_grpo import sde
from flow_grpo.objectives.base import Objective, Predict, Reduce, Statistic
from flow_grpo.randomness import Randomness
from flow_grpo.records import Loss, Point, Rollout
from flow_grpo.sampling import Schedule, replay


class GRPO(Objective):
    """max(-A r, -A clip(r, 1 +- clip_range)) with r = exp(log_prob - old_log_prob), plus beta KL.

    train.kl_mode: "kl_true" is the Gaussians' KL per element, "kl_dt" that times sigma - sigma_next
    (the scale of published betas), "x" and "v" squared distances of means and of velocities.
    train.step_weight "std": each step's loss times its std over the mean std of all trainable
    steps, as in TempFlow-GRPO (arXiv:2508.04324).
    """

    statistics = {
        "ratio_std": Statistic("Ratio, standard deviation", "how far the policy has moved"),
        "ratio": Statistic("Ratio, mean − 1", "exactly 0 before an epoch's first update", 1.0),
        "clip_high": Statistic("Clipped above", "share of ratios above 1 + clip_range"),
        "clip_low": Statistic("Clipped below", "share of ratios below 1 − clip_range"),
        "approx_kl": Statistic("Approximate KL", "mean of (log-ratio)² / 2"),
        "kl": Statistic("KL to the reference", "in the unit of train.kl_mode"),
        "policy_loss": Statistic("Policy loss", "the clipped surrogate, without the KL"),
    }

    @classmethod
    def check(cls, config) -> None:
        sample, train = config.sample, config.train
        if train.old_log_prob == "rollout":
            if train.batch_size not in (None, sample.train_batch_size):
                raise ValueError(
                    f"config.train.batch_size={train.batch_size} differs from config.sample."
                    f"train_batch_size={sample.train_batch_size}: the same rows then give other "
                    f"bits. Set config.train.old_log_prob=replay, or make the two equal."
                )
        if sample.guidance_scale > 1 and not train.cfg:
            raise ValueError(
                f"config.train.cfg=False with config.sample.guidance_scale="
                f"{sample.guidance_scale}: the trained policy would not be the one that "
                f"sampled. Set config.train.cfg=True or config.sample.guidance_scale=1."
            )
        if sample.noise_level <= 0:
            raise ValueError(
                f"config.sample.noise_level={sample.noise_level}: without noise a step has no "
                f"log-probability. A positive number is needed, 0.7 for example."
            )
        if sample.sde_type == "cps" and sample.noise_level > 1:
            raise ValueError(
                f"config.sample.noise_level={sample.noise_level}: CPS takes values in (0, 1]."
            )

    def __init__(self, config, schedule: Schedule):
        super().__init__(config, schedule)
        train = config.train
        self.clip_range = train.clip_range
        self.beta, self.kl_mode = train.beta, train.kl_mode
        self.replays = train.old_log_prob == "replay"
        if self.beta:
            self.snapshots = self.anchors = ("reference",)
        self.step_weight = _step_weights(schedule) if train.step_weight == "std" else None

    def prepare(self, micro: Rollout, predict: Predict) -> None:
        if self.replays:
            for point in self._points(micro):
                step = replay(self.schedule, micro, point.column, predict(point))
                micro.log_probs[:, point.column] = step.log_prob

    def points(self, micro: Rollout, randomness: Randomness) -> list[Point]:
        return self._points(micro)

    def _points(self, micro: Rollout) -> list[Point]:
        return [
            Point(micro.latents[:, k], self.schedule.sigmas[steps], step=steps, column=k)
            for k, steps in enumerate(micro.steps.unbind(1))
        ]

    def loss(
        self,
        velocity: Tensor,
        anchors: dict[str, Tensor],
        micro: Rollout,
        point: Point,
        reduce: Reduce,
    ) -> Loss:
        step = replay(self.schedule, micro, point.column, velocity)
        log_ratio = (step.log_prob - micro.log_probs[:, point.column]).clamp(-20, 20)
        value, stats = clipped_surrogate(log_ratio, micro.advantages, self.clip_range)
        if self.step_weight is not None:
            value = value * self.step_weight[point.step]
        if self.beta:
            kl = self._kl(step, velocity, anchors["reference"], micro, point)
            value = value + self.beta * kl
            stats["kl"] = kl.detach()
        return Loss(value, stats)

    def _kl(
        self, step: sde.Step, velocity: Tensor, reference: Tensor, micro: Rollout, point: Point
    ) -> Tensor:
        """Divergence from the reference's step at the same state, (B,)."""
        if self.kl_mode == "v":
            return ((velocity - reference) ** 2).flatten(1).mean(1)
        mean = replay(self.schedule, micro, point.column, reference).mean
        if self.kl_mode == "x":
            return ((step.mean - mean) ** 2).flatten(1).mean(1)
        kl = sde.mean_kl(step.mean, mean, step.std)
        if self.kl_mode == "kl_dt" and self.schedule.kind != "cps":  # CPS's std has no sqrt(dt)
            kl = kl * (point.sigma - self.schedule.sigmas[point.step + 1])
        return kl

    def mismatch(self, velocity: Tensor, micro: Rollout, point: Point) -> Tensor:
        step = replay(self.schedule, micro, point.column, velocity)
        return (step.log_prob - micro.log_probs[:, point.column]).abs()

    @property
    def tolerance(self) -> float:
        return self.clip_range / 10


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


def _step_weights(schedule: Schedule) -> Tensor:
    """Each step's std over the mean std of all steps but the last, (N - 1,)."""
    sigmas = schedule.sigmas
    zeros = torch.zeros(schedule.num_steps - 1, 1, device=sigmas.device)
    step = sde.step(
        schedule.kind,
        zeros,
        zeros,
        sigmas[:-2],
        sigmas[1:-1],
        schedule.noise_level,
        sigma_guard=sigmas[1],
        noise=zeros,
    )
    return step.std.flatten() / step.std.mean()
