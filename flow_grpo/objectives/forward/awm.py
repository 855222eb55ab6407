"""AWM, advantage-weighted matching (arXiv:2509.25050): PPO on a weighted matching error."""

from torch import Tensor

from flow_grpo.keys import Key
from flow_grpo.objectives.forward import anchored
from flow_grpo.objectives.forward.elbo import WEIGHTINGS, Elbo, weighted_error
from flow_grpo.records import Point, Rollout


class AWM(Elbo):
    """Each noising has its own ratio; advantages are divided by their bound, as the authors do."""

    keys = anchored.keys(num_times=6) | {
        "awm.weighting": Key("ghuber", "of the matching error by its level", choices=WEIGHTINGS),
        "awm.power": Key(0.25, "of ghuber", above=0, most=1),
        "awm.clip_range": Key(1.0, "of the ratio; 0: none", least=0, most=100),
    }

    def __init__(self, config, schedule):
        super().__init__(config, schedule)
        self.weighting, self.power = config.awm.weighting, config.awm.power
        self.clip_range = config.awm.clip_range

    def targets(self, scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        advantages, weights = super().targets(scores, group)
        return advantages / self.adv_clip_max, weights

    def error(self, velocity: Tensor, rows: Rollout, point: Point) -> Tensor:
        return weighted_error(self.weighting, velocity, rows, point, self.power)
