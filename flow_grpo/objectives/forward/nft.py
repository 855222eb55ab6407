"""DiffusionNFT (arXiv:2509.16117): contrast two implicit policies on noised final images."""

from torch import Tensor

from flow_grpo.keys import Key
from flow_grpo.objectives.base import Micro, Objective, Predict, Snapshots, Statistic, Values
from flow_grpo.objectives.forward.noising import Noising
from flow_grpo.plan import Passes
from flow_grpo.randomness import Randomness
from flow_grpo.records import Loss, Point, Rollout
from flow_grpo.sampling import Schedule
from flow_grpo.sde import per_row


class NFT(Objective):
    """Rolls out with an old copy of the policy, needs no log-probs, and trains at fresh noisings.

    With v the policy's and o the old copy's velocity, v+ = b v + (1 - b) o and
    v- = (1 + b) o - b v; the loss weighs the errors of their clean predictions by the image's
    optimality q = 1/2 + A / (2 A_max).
    """

    draws_points = True
    statistics = {
        "drift": Statistic("Drift", "mean squared difference from the old policy's velocity"),
        "kl": Statistic("KL to the reference", "mean squared difference of the velocities"),
        "positive_loss": Statistic("Loss of the positive branch", "before its weight"),
    }
    keys = {
        "nft.beta": Key(
            1.0, "how far the implicit policies lie from the old one", above=0, most=1000
        ),
        "nft.kl_beta": Key(1e-4, "velocity-space KL to the reference", least=0, most=10**6),
        "nft.decay": Key(
            "half",
            "of the old policy; types 0, 1, 2 of the paper's code",
            choices=("on_policy", "half", "slow"),
        ),
        "nft.num_times": Key(4, "noise levels drawn for each image", least=1, most=1000),
        "nft.steps": Key(
            (), "instead: the levels of these steps, for every image", of=int, least=0, most=1000
        ),
    }

    @classmethod
    def check(cls, config, family) -> None:
        steps, known = list(config.nft.steps), range(config.sample.num_steps)
        if steps != sorted(set(steps) & set(known)):
            raise ValueError(
                f"config.nft.steps={tuple(steps)}: distinct, ascending steps from 0 to {known[-1]} "
                f"are needed, as config.sample.num_steps={len(known)}; or () to draw num_times."
            )

    def __init__(self, config, schedule: Schedule):
        super().__init__(config, schedule)
        self.beta, self.kl_beta = config.nft.beta, config.nft.kl_beta
        self.noising = Noising(config.nft.num_times, tuple(config.nft.steps))
        self.decay = config.nft.decay
        self.snapshots = ("old", "reference") if self.kl_beta else ("old",)

    def samples_with(self, epoch: int, num_updates: int) -> str:
        return "old"

    def points(self, rows: Rollout, randomness: Randomness) -> list[Point]:
        return self.noising.points(rows, self.schedule, randomness)

    def freeze(self, micros: list[Micro], predict: Predict) -> dict[str, Values]:
        return {name: predict(micros, name) for name in self.snapshots}

    def loss(self, velocity: Tensor, known: dict[str, Tensor], rows: Rollout, point: Point) -> Loss:
        target, advantages = point.noise - rows.final, rows.at("advantages", point.column)
        value, stats = contrast(
            velocity, known["old"], target, point.sigma, advantages, self.beta, self.adv_clip_max
        )
        if self.kl_beta:
            kl = ((velocity - known["reference"]) ** 2).flatten(1).mean(1)
            value = value + self.kl_beta * kl
            stats["kl"] = kl.detach()
        return Loss(value, stats)

    def passes(self, num_kept: float) -> Passes:
        points = len(self.noising)
        return Passes(points, points * len(self.snapshots), 0)

    def after_epoch(self, snapshots: Snapshots, num_updates: int) -> None:
        snapshots.update("old", old_decay(self.decay, num_updates))


def contrast(
    velocity: Tensor,
    old: Tensor,
    target: Tensor,
    sigma: Tensor,
    advantages: Tensor,
    beta: float,
    adv_clip_max: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss (B,) of each row. target: x1 - x0 of the noising, (B, ...)."""
    quality = (0.5 + advantages.clamp(-adv_clip_max, adv_clip_max) / (2 * adv_clip_max)).clamp(0, 1)
    positive = beta * velocity + (1 - beta) * old
    negative = (1 + beta) * old - beta * velocity
    wide = per_row(sigma, target)
    losses = []
    for implicit in (positive, negative):
        error = wide * (target - implicit)  # of the clean prediction
        scale = error.detach().double().abs().flatten(1).mean(1).clamp(min=1e-5)
        losses.append((error**2).flatten(1).mean(1) / scale.to(error.dtype))
    value = adv_clip_max * (quality * losses[0] + (1 - quality) * losses[1]) / beta
    drift = ((velocity - old) ** 2).flatten(1).mean(1)
    return value, {"drift": drift.detach(), "positive_loss": losses[0].detach()}


def old_decay(kind: str, num_updates: int) -> float:
    """How much of the old policy stays after an epoch: nothing, up to .5, or up to .999."""
    if kind == "on_policy":
        return 0.0
    if kind == "half":
        return min(0.001 * num_updates, 0.5)
    return 0.0 if num_updates < 75 else min(0.0075 * (num_updates - 75), 0.999)
