"""EPG (arXiv:2602.04663): the plain policy gradient of an image's ELBO, without a ratio."""

from torch import Tensor

from flow_grpo.keys import Key
from flow_grpo.objectives.base import Statistic
from flow_grpo.objectives.forward import anchored
from flow_grpo.objectives.forward.elbo import OLD_KL, WEIGHTINGS, weighted_error
from flow_grpo.objectives.norms import squared
from flow_grpo.records import Point, Rollout
from flow_grpo.sde import per_row


class EPG(anchored.Forward):
    """A error, plus epg.proximal times the squared way from the old policy's clean prediction."""

    keys = anchored.keys() | {
        "epg.weighting": Key(
            "adaptive",
            "of the matching error by its level: those of AWM, or V-GRPO's",
            choices=(*WEIGHTINGS, "adaptive"),
        ),
        "epg.proximal": Key(0.0, "PEPG's pull to the old policy", least=0, most=10**6),
    }
    statistics = (
        anchored.STATISTICS
        | OLD_KL
        | {
            "error": Statistic("Matching error", "weighted, without the advantage"),
        }
    )

    def __init__(self, config, schedule):
        self.weighting, self.proximal = config.epg.weighting, config.epg.proximal
        self.needs = ("old",) if self.proximal else ()
        super().__init__(config, schedule)

    def matching(
        self, velocity: Tensor, known: dict[str, Tensor], rows: Rollout, point: Point
    ) -> tuple[Tensor, dict[str, Tensor]]:
        error = weighted_error(self.weighting, velocity, rows, point).to(velocity.dtype)
        value, stats = rows.at("advantages", point.column) * error, {"error": error.detach()}
        if self.proximal:
            kl = squared(per_row(point.sigma, velocity) * (velocity - known["old"]))
            value = value + self.proximal * kl
            stats["old_kl"] = kl.detach()
        return value, stats
