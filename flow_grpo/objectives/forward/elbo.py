"""Minus a weighted matching error in place of an image's log-probability, and its ratio."""

import torch
from torch import Tensor

from flow_grpo.objectives.base import Micro, Predict, Statistic, Values
from flow_grpo.objectives.forward.anchored import STATISTICS, Forward
from flow_grpo.objectives.norms import squared
from flow_grpo.objectives.ratio import terms
from flow_grpo.records import Point, Rollout
from flow_grpo.sde import per_row

WEIGHTINGS = ("uniform", "t", "t2", "huber", "ghuber")  # of AWM (arXiv:2509.25050)
OF_RATIO = ("ratio", "ratio_std", "clip_high", "clip_low", "approx_kl", "policy_loss")


OLD_KL = {
    "old_kl": Statistic("KL to the old policy", "mean squared difference of clean predictions")
}


def adaptive(error: Tensor) -> Tensor:
    """Return mean(error^2) / mean|error| of clean predictions' errors (B, ...), (B,).

    The denominator has no gradient (DiffusionNFT).
    """
    scale = error.detach().double().abs().flatten(1).mean(1).clamp(min=1e-5)
    return squared(error) / scale.to(error.dtype)


def weighted_error(
    kind: str, velocity: Tensor, rows: Rollout, point: Point, power: float = 0.25
) -> Tensor:
    """Return minus the log-probability up to a constant, (B,) fp64, at one noising.

    kind: of l = mean((velocity - (x1 - x0))^2), "uniform" l; "t" sigma l; "t2" sigma^2 l; "huber"
    sigma (sqrt(l + 1e-10) - 1e-5); "ghuber" sigma / power ((l + 1e-10)^power - 1e-10^power); or
    "adaptive", see adaptive().
    """
    error = velocity.double() - (point.noise - rows.final)
    sigma = point.sigma.double()
    if kind == "adaptive":
        return adaptive(per_row(sigma, error) * error)
    error = squared(error)
    if kind in ("uniform", "t", "t2"):
        return error * sigma ** ("uniform", "t", "t2").index(kind)
    power = 0.5 if kind == "huber" else power
    value = ((error + 1e-10) ** power - 1e-10**power) * sigma
    return value if kind == "huber" else value / power


class Elbo(Forward):
    """PPO's clipped surrogate with r = exp(error_old - error), and the way back to the old policy.

    error(): of a row at one noising. Each noising has its own ratio; or with replays an image has
    one, its error being the mean over its noisings. In the first update on policy r is 1, and the
    gradient is that of A error.
    """

    needs = ("old",)
    clip_range = old_beta = 0.0
    statistics = STATISTICS | {name: terms.STATISTICS[name] for name in OF_RATIO}

    def error(self, velocity: Tensor, rows: Rollout, point: Point) -> Tensor:
        raise NotImplementedError

    def freeze(self, micros: list[Micro], predict: Predict) -> dict[str, Values]:
        known = super().freeze(micros, predict)
        if self.replays and "old" in known:
            old, new = (self._errors(micros, of) for of in (known["old"], predict(micros)))
            known["log_ratio"] = [
                [was - now] * len(micro.points)
                for micro, was, now in zip(micros, old, new, strict=True)
            ]
            if not self.old_beta:
                del known["old"]
        return known

    def _errors(self, micros: list[Micro], velocities: Values) -> list[Tensor]:
        """Return the mean over its noisings of each row's error, (M,) of each micro-batch."""
        means = []
        for micro, of_points in zip(micros, velocities, strict=True):
            each = zip(of_points, micro.points, strict=True)
            errors = [self.error(velocity, micro.rows, point) for velocity, point in each]
            means.append(torch.stack(errors).mean(0))
        return means

    def matching(
        self, velocity: Tensor, known: dict[str, Tensor], rows: Rollout, point: Point
    ) -> tuple[Tensor, dict[str, Tensor]]:
        error = self.error(velocity, rows, point)
        if "log_ratio" in known:
            log_ratio = known["log_ratio"] + (error.detach() - error)
        else:
            log_ratio = self.error(known["old"], rows, point) - error
        log_ratio = log_ratio.clamp(-20, 20).to(velocity.dtype)
        clip = self.clip_range or torch.inf
        advantages = rows.at("advantages", point.column)
        value, stats = terms.clipped_surrogate(log_ratio, advantages, clip, clip)
        if self.old_beta:
            sigma = per_row(point.sigma, velocity)
            kl = squared(sigma * (velocity - known["old"]))
            value = value + self.old_beta * kl
            stats["old_kl"] = kl.detach()
        return value, stats
