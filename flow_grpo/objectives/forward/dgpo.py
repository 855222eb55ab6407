"""DGPO (arXiv:2510.08425): a group's images against the reference, as DPO has a pair's."""

import torch
from torch import Tensor

from flow_grpo.keys import Key
from flow_grpo.objectives.base import Micro, Predict, Statistic, Values
from flow_grpo.objectives.forward import anchored
from flow_grpo.objectives.forward.grouped import Grouped, group_sums
from flow_grpo.objectives.forward.noising import error
from flow_grpo.records import Point, Rollout


class DGPO(Grouped):
    """w A e, w = sigmoid(beta / G sum of A (e - e_ref) over the group) without a gradient.

    That is 1 / beta of the gradient of -log sigmoid(-that sum). e: the velocity's mean squared
    error at noises that a group, and levels that all images share. dgpo.clip_range: a row whose
    exp(e_fast - e) has moved further than that from 1, where its advantage pushed, has no gradient.
    """

    keys = anchored.keys(levels="distinct", levels_of="all", noise_of="group") | {
        "dgpo.beta": Key(100.0, "how much a group's errors count", above=0, most=10**6),
        "dgpo.clip_range": Key(0.0, "against the fast average; 0: none", least=0, most=100),
        "dgpo.reference": Key(
            "reference", "what errors are compared with", choices=("reference", "fast")
        ),
        "dgpo.fast_from": Key(
            -1, "updates after which the fast average rolls out; -1: never", least=-1, most=10**9
        ),
    }
    statistics = anchored.STATISTICS | {
        "group_weight": Statistic("Weight of a group", "1/2 at the reference"),
        "error": Statistic("Error", "mean squared error of the velocity"),
        "clipped": Statistic("Clipped", "share of rows without a gradient"),
    }

    def __init__(self, config, schedule):
        own = config.dgpo
        self.beta, self.clip_range, self.fast_from = own.beta, own.clip_range, own.fast_from
        self.against = own.reference
        self.needs = (self.against, "fast") if self.clip_range else (self.against,)
        super().__init__(config, schedule)
        if self.fast_from >= 0 and "fast" not in self.snapshots:
            self.snapshots = (*self.snapshots, "fast")

    def samples_with(self, epoch: int, num_updates: int) -> str:
        usual = super().samples_with(epoch, num_updates)
        return "fast" if 0 <= self.fast_from <= num_updates else usual

    def freeze(self, micros: list[Micro], predict: Predict) -> dict[str, Values]:
        known, values = super().freeze(micros, predict), {"moved": [], "rows": []}
        for micro, new, base in zip(micros, predict(micros), known[self.against], strict=True):
            rows, moved = micro.rows, []
            for point, v, v_base in zip(micro.points, new, base, strict=True):
                gained = error(v, rows, point) - error(v_base, rows, point)
                moved.append(rows.at("advantages", point.column) * gained)
            values["moved"].append(moved)
            values["rows"].append([torch.ones_like(each) for each in moved])
        sums = group_sums(micros, values, self.gather)
        known["group_weight"] = [
            [torch.sigmoid(self.beta * s / n.clamp(min=1)) for s, n in zip(*both, strict=True)]
            for both in zip(sums["moved"], sums["rows"], strict=True)
        ]
        return known

    def matching(
        self, velocity: Tensor, known: dict[str, Tensor], rows: Rollout, point: Point
    ) -> tuple[Tensor, dict[str, Tensor]]:
        advantages, weight = rows.at("advantages", point.column), known["group_weight"]
        errors = error(velocity, rows, point)
        stats = {"group_weight": weight, "error": errors.detach()}
        if self.clip_range:
            ratio = (error(known["fast"], rows, point) - errors.detach()).exp()
            over = torch.where(advantages > 0, ratio - 1, 1 - ratio) > self.clip_range
            errors = torch.where(over, errors.detach(), errors)
            stats["clipped"] = over.float()
        return weight * advantages * errors, stats
