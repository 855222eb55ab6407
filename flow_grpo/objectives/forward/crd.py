"""CRD, centred reward distillation (arXiv:2603.14128): implicit rewards fit the given ones."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from flow_grpo.keys import Key
from flow_grpo.objectives.base import Micro, Predict, Statistic, Values
from flow_grpo.objectives.forward import anchored
from flow_grpo.objectives.forward.elbo import adaptive
from flow_grpo.objectives.forward.grouped import Grouped, group_sums
from flow_grpo.records import Point, Rollout


class CRD(Grouped):
    """A_max / beta (beta (r - r') - (R - R'))^2, R = 1/2 + A / (2 A_max), r the implicit reward.

    r = l_old - l with l = mean (v - y)^2 / w, w = mean |v - y| without a gradient, y = x1 - x0. r'
    and R' are means over the group's rows at a noising, without a gradient, by equal weights, or
    once by those of softmax(R / T) and once of softmax(-R / T), the loss being the mean of both.
    """

    needs = ("old",)
    keys = anchored.keys(kl_beta=0.1, decay="rising") | {
        "crd.beta": Key(1.0, "of the implicit reward", above=0, most=1000),
        "crd.loss": Key("squared", "of centred rewards", choices=("squared", "cross_entropy")),
        "crd.temperature": Key(0.0, "T; 0: a group's rows count alike", least=0, most=1000),
        "crd.least_pull": Key(
            1e-3, "weight of the KL of a row whose R is 0; 1 where R is 1", least=0, most=1
        ),
    }
    statistics = anchored.STATISTICS | {
        "implicit_reward": Statistic("Implicit reward", "how far the error fell"),
        "misfit": Statistic("Misfit of rewards", "the centred loss, before its weight"),
    }

    def __init__(self, config, schedule):
        super().__init__(config, schedule)
        own = config.crd
        self.beta, self.least_pull = own.beta, own.least_pull
        self.cross_entropy = own.loss == "cross_entropy"
        self.signs = (1 / own.temperature, -1 / own.temperature) if own.temperature else (0.0,)

    def reward(self, rows: Rollout, point: Point) -> Tensor:
        advantages, most = rows.at("advantages", point.column), self.adv_clip_max
        return advantages.clamp(-most, most) / (2 * most) + 0.5

    def implicit(self, velocity: Tensor, old: Tensor, rows: Rollout, point: Point) -> Tensor:
        target = point.noise - rows.final
        return adaptive(old - target) - adaptive(velocity - target)

    def freeze(self, micros: list[Micro], predict: Predict) -> dict[str, Values]:
        known = super().freeze(micros, predict)
        olds = known.get("old")
        news = olds and predict(micros)
        values = {f"{name}{d}": [] for d in self.signs for name in ("implicit", "reward", "weight")}
        for i, micro in enumerate(micros):
            rows = micro.rows
            rewards = [self.reward(rows, point) for point in micro.points]
            implicit = [torch.zeros_like(each) for each in rewards]  # of the old policy itself
            if olds:
                each = zip(news[i], olds[i], micro.points, strict=True)
                implicit = [self.implicit(new, old, rows, point) for new, old, point in each]
            for sign in self.signs:
                pushed = [sign * (each.double() - 0.5) for each in rewards]
                weights = [each.clamp(-300, 300).exp() for each in pushed]
                for name, of in (("implicit", implicit), ("reward", rewards)):
                    each = zip(of, weights, strict=True)
                    values[f"{name}{sign}"].append([value * weight for value, weight in each])
                values[f"weight{sign}"].append(weights)
        return known | group_sums(micros, values, self.gather)

    def matching(
        self, velocity: Tensor, known: dict[str, Tensor], rows: Rollout, point: Point
    ) -> tuple[Tensor, dict[str, Tensor]]:
        implicit = self.implicit(velocity, known["old"], rows, point)
        reward, misfit = self.reward(rows, point), 0.0
        for sign in self.signs:
            total = known[f"weight{sign}"]
            ours = self.beta * (implicit - (known[f"implicit{sign}"] / total).to(implicit))
            theirs = reward - (known[f"reward{sign}"] / total).to(reward)
            if self.cross_entropy:
                fit = binary_cross_entropy_with_logits(ours, theirs.sigmoid(), reduction="none")
            else:
                fit = (ours - theirs) ** 2
            misfit = misfit + fit / len(self.signs)
        stats = {"implicit_reward": implicit.detach(), "misfit": misfit.detach()}
        return self.adv_clip_max / self.beta * misfit, stats

    def pull(self, kl: Tensor, rows: Rollout, point: Point) -> Tensor:
        kl = super().pull(kl, rows, point)
        return (self.least_pull + self.reward(rows, point) * (1 - self.least_pull)) * kl
