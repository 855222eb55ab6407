"""RAM, reinforce adjoint matching (arXiv:2605.10759): regress to a target that reward corrects."""

from torch import Tensor

from flow_grpo.keys import Key
from flow_grpo.objectives.base import Statistic
from flow_grpo.objectives.forward import anchored
from flow_grpo.objectives.forward.noising import error
from flow_grpo.objectives.norms import squared
from flow_grpo.records import Point, Rollout
from flow_grpo.sde import per_row


class RAM(anchored.Forward):
    """mean |v - sg(v_ref + R (x1 - x0 - v))|^2 with R = ram.scale A.

    The reference is the anchor that the derivation has; without an old policy or a ratio. At the
    reference the gradient is R times that of the matching error.
    """

    needs = ("reference",)
    keys = anchored.keys() | {
        "ram.scale": Key(1.0, "of the reward: an advantage times this", above=0, most=10**6)
    }
    statistics = anchored.STATISTICS | {
        "error": Statistic("Error", "mean squared error of the velocity"),
    }

    def __init__(self, config, schedule):
        super().__init__(config, schedule)
        self.scale = config.ram.scale

    def matching(
        self, velocity: Tensor, known: dict[str, Tensor], rows: Rollout, point: Point
    ) -> tuple[Tensor, dict[str, Tensor]]:
        reward = per_row(self.scale * rows.at("advantages", point.column), velocity)
        missing = point.noise - rows.final - velocity
        target = (known["reference"] + reward * missing).detach()
        stats = {"error": error(velocity.detach(), rows, point)}
        return squared(velocity - target), stats
