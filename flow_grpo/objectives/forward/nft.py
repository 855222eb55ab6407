"""DiffusionNFT (arXiv:2509.16117): contrast two implicit policies on noised final images."""

from torch import Tensor

from flow_grpo.keys import Key
from flow_grpo.objectives.base import Statistic
from flow_grpo.objectives.forward import anchored
from flow_grpo.objectives.forward.elbo import adaptive
from flow_grpo.objectives.norms import squared
from flow_grpo.records import Point, Rollout
from flow_grpo.sde import per_row


class NFT(anchored.Forward):
    """Rolls out with an old copy of the policy, needs no log-probs, and trains at fresh noisings.

    With v the policy's and o the old copy's velocity, v+ = b v + (1 - b) o and
    v- = (1 + b) o - b v; the loss weighs the errors of their clean predictions by the image's
    optimality q = 1/2 + A / (2 A_max).
    """

    section, needs = "nft", ("old",)
    statistics = anchored.STATISTICS | {
        "drift": Statistic("Drift", "mean squared difference from the old policy's velocity"),
        "positive_loss": Statistic("Loss of the positive branch", "before its weight"),
    }
    keys = anchored.keys("nft", kl_beta=1e-4, decay="half") | {
        "nft.beta": Key(
            1.0, "how far the implicit policies lie from the old one", above=0, most=1000
        ),
    }

    def __init__(self, config, schedule):
        super().__init__(config, schedule)
        self.beta = config.nft.beta

    def matching(
        self, velocity: Tensor, known: dict[str, Tensor], rows: Rollout, point: Point
    ) -> tuple[Tensor, dict[str, Tensor]]:
        old, most = known["old"], self.adv_clip_max
        advantages = rows.at("advantages", point.column)
        quality = (0.5 + advantages.clamp(-most, most) / (2 * most)).clamp(0, 1)
        positive = self.beta * velocity + (1 - self.beta) * old
        negative = (1 + self.beta) * old - self.beta * velocity
        target, wide = point.noise - rows.final, per_row(point.sigma, rows.final)
        losses = [adaptive(wide * (target - implicit)) for implicit in (positive, negative)]
        value = most * (quality * losses[0] + (1 - quality) * losses[1]) / self.beta
        drift = squared(velocity - old)
        return value, {"drift": drift.detach(), "positive_loss": losses[0].detach()}
