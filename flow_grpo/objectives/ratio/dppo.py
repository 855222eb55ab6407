"""Flow-DPPO (arXiv:2606.11025): a step that has moved far enough is left out, not clipped."""

import torch
from torch import Tensor

from flow_grpo import sde
from flow_grpo.keys import Key
from flow_grpo.objectives.base import Statistic
from flow_grpo.objectives.ratio import terms
from flow_grpo.objectives.ratio.grpo import GRPO, OldStep
from flow_grpo.records import Point, Rollout


class FlowDPPO(GRPO):
    """-A r with r = exp(log_prob - old_log_prob), but 0 where the step would move on outwards.

    That is where the KL of the step to the one that was sampled is at least dppo.threshold, and A
    pushes r further from 1. Such a row still counts in the mean.
    """

    keys = {name: key for name, key in terms.KEYS.items() if "clip" not in name} | {
        "dppo.threshold": Key(1e-5, "KL per element of a step to the old one", least=0, most=10**6)
    }
    keeps = ("states", "log_probs", "means")
    statistics = {name: of for name, of in terms.STATISTICS.items() if "clip" not in name} | {
        "step_kl": Statistic("KL to the old step", "per element"),
        "dropped": Statistic("Left out", "share of rows that moved far enough"),
    }

    def __init__(self, config, schedule):
        super().__init__(config, schedule)
        self.threshold = config.dppo.threshold

    def surrogate(
        self, step: sde.Step, old: OldStep, rows: Rollout, point: Point
    ) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = (step.log_prob - old.log_prob).clamp(-20, 20)
        ratio, advantages = log_ratio.exp(), rows.at("advantages", point.column)
        moved = sde.mean_kl(step.mean, old.mean, step.std).detach()
        outwards = (ratio.detach() - 1) * advantages > 0
        dropped = outwards & (moved >= self.threshold)
        value = torch.where(dropped, 0.0, -advantages * ratio)
        stats = terms.ratio_stats(log_ratio, value)
        return value, stats | {"step_kl": moved, "dropped": dropped.float()}

    def clip_limits(self) -> dict[str, float]:
        return {"log_ratio": self.threshold / 10}
