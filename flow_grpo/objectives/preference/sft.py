"""Fine-tuning on one's own images: the best of each group (RAFT), or all by their rewards (RWR)."""

import numpy as np
import torch
from torch import Tensor

from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.keys import Key
from flow_grpo.objectives.base import Micro, Objective, Predict, Snapshots, Statistic, Values
from flow_grpo.objectives.forward.noising import Noising, check_steps, drawn, error
from flow_grpo.objectives.norms import NORM_RATIO, norm_ratio, squared
from flow_grpo.objectives.preference.reference import REF_UPDATE_STEP, refresh
from flow_grpo.plan import Passes, Plan
from flow_grpo.randomness import Randomness
from flow_grpo.records import Arranged, Loss, Point, Rollout, RowTable


class SFT(Objective):
    """w e + beta mean((v - v_ref)^2), e the mean squared error of the velocity at fresh noise.

    sft.weights: "best" trains the images of a group whose reward is its highest, w = 1; "reward"
    trains all, w the reward as it is, of any sign. A copy samples; online it becomes the policy
    from time to time. The reference is the run's start.
    """

    draws_points = True
    selects = True
    keys = {
        "train.beta": Key(0.0, "velocity-space KL to the reference", least=0, most=10**6),
        "train.ref_update_step": REF_UPDATE_STEP,
        "sft.weights": Key("best", "which images train, and how much", choices=("best", "reward")),
        **drawn("sft", "image"),
    }
    statistics = {
        "error": Statistic("Error", "mean squared error of the velocity"),
        "kl": Statistic("KL to the reference", "mean squared difference of the velocities"),
        **NORM_RATIO,
    }

    @classmethod
    def check(cls, config, family: type[PatchedPipeline]) -> None:
        check_steps(config, "sft")

    def __init__(self, config, schedule):
        super().__init__(config, schedule)
        self.beta, self.ref_update_step = config.train.beta, config.train.ref_update_step
        times, steps, density = config.sft.num_times, config.sft.steps, config.sft.density
        self.noising = Noising(times, tuple(steps), density)
        self.best = config.sft.weights == "best"
        self.share = 1 / config.sample.num_image_per_prompt if self.best else 1.0
        self.snapshots = ("sampling", "reference") if self.beta else ("sampling",)

    def samples_with(self, epoch: int, num_updates: int) -> str:
        return "sampling"

    def arrange(self, scores: Tensor, rows: RowTable, plan: Plan, epoch: int) -> Arranged:
        of_ranks = [rows.of_rank(rank) for rank in range(plan.world_size)]
        weights = (~scores.isnan()).double()
        if not self.best:
            updates = plan.in_order(of_ranks, epoch)
            return Arranged(updates, advantages=scores.nan_to_num(0.0), weights=weights)
        group = rows.group.unique(return_inverse=True)[1]
        scored = scores.nan_to_num(-torch.inf)
        highest = scored.new_empty(int(group.max()) + 1).fill_(-torch.inf)
        highest = highest.scatter_reduce(0, group, scored, "amax")
        weights *= scored == highest[group]
        best = [[np.array([n]) for n in mine if weights[n] > 0] for mine in of_ranks]
        return Arranged(plan.in_sets(best, of_ranks, epoch), advantages=weights, weights=weights)

    def points(self, rows: Rollout, randomness: Randomness) -> list[Point]:
        return self.noising.points(rows, self.schedule, randomness)

    def freeze(self, micros: list[Micro], predict: Predict) -> dict[str, Values]:
        return {"reference": predict(micros, "reference")} if self.beta else {}

    def loss(self, velocity: Tensor, known: dict[str, Tensor], rows: Rollout, point: Point) -> Loss:
        errors = error(velocity, rows, point)
        value, stats = rows.at("advantages", point.column) * errors, {"error": errors.detach()}
        if self.beta:
            kl = squared(velocity - known["reference"])
            value = value + self.beta * kl
            stats |= {"kl": kl.detach(), "norm_ratio": norm_ratio(velocity, known["reference"])}
        return Loss(value, stats)

    def passes(self, num_kept: float) -> Passes:
        points = len(self.noising)
        frozen = points * bool(self.beta)
        return Passes(points, frozen, 0, share=self.share, reference=(frozen, 0))

    def after_update(
        self, snapshots: Snapshots, num_updates: int, metrics: dict[str, float]
    ) -> None:
        refresh(snapshots, "sampling", self.ref_update_step, num_updates)
