"""V-GRPO (arXiv:2604.23380): GRPO with one ratio for an image, of its mean adaptive error."""

import torch
from torch import Tensor

from flow_grpo.keys import Key
from flow_grpo.objectives.forward import anchored
from flow_grpo.objectives.forward.elbo import OLD_KL, Elbo, weighted_error
from flow_grpo.records import Point, Rollout


class VGRPO(Elbo):
    """A group has its levels, one in each of num_times intervals, and its noises in common.

    One of three keeps the steps small: a clipped ratio, a pull to the old policy (the authors' .3),
    or A <- squash tanh(A / squash) (3 to 5).
    """

    replays = 1
    statistics = Elbo.statistics | OLD_KL
    keys = anchored.keys(levels="stratified", levels_of="group", noise_of="group") | {
        "vgrpo.clip_range": Key(0.03, "of the ratio; 0: none", least=0, most=100),
        "vgrpo.old_beta": Key(
            0.0, "squared difference of clean predictions to the old policy's", least=0, most=10**6
        ),
        "vgrpo.squash": Key(0.0, "bound of tanh, of the advantages; 0: none", least=0, most=1000),
    }

    def __init__(self, config, schedule):
        super().__init__(config, schedule)
        self.clip_range, self.old_beta = config.vgrpo.clip_range, config.vgrpo.old_beta
        self.squash = config.vgrpo.squash

    def targets(self, scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        advantages, weights = super().targets(scores, group)
        if self.squash:
            advantages = self.squash * torch.tanh(advantages / self.squash)
        return advantages, weights

    def error(self, velocity: Tensor, rows: Rollout, point: Point) -> Tensor:
        return weighted_error("adaptive", velocity, rows, point)
