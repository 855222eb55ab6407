"""DPO (arXiv:2311.12908): tell the best image of a group from its worst, offline or online."""

import numpy as np
from torch import Tensor
from torch.nn.functional import logsigmoid

from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.keys import Key
from flow_grpo.objectives.base import Micro, Objective, Predict, Snapshots, Statistic, Values
from flow_grpo.objectives.forward.noising import Noising, check_steps, drawn, error
from flow_grpo.objectives.norms import NORM_RATIO, norm_ratio
from flow_grpo.objectives.preference.reference import REF_UPDATE_STEP, refresh
from flow_grpo.plan import Passes, Plan
from flow_grpo.randomness import Randomness
from flow_grpo.records import Arranged, Loss, Point, Rollout, RowTable


class DPO(Objective):
    """-log sigmoid(-beta / 2 d), d = (e_w - e_ref_w) - (e_l - e_ref_l) of a winner and a loser.

    e: the mean squared error of a velocity at one noise and level that a pair shares. The reference
    samples; online it becomes the policy from time to time. The rest of a group costs no forward.
    """

    draws_points = True
    selects = True
    snapshots = ("reference",)
    keys = {
        "train.beta": Key(100.0, "how much a pair's errors count", above=0, most=10**6),
        "train.ref_update_step": REF_UPDATE_STEP,
        **drawn("dpo", "pair"),
    }
    statistics = {
        "accuracy": Statistic("Pairs told apart", "share with d < 0"),
        "winner_error": Statistic("Error of winners", "less the reference's"),
        "loser_error": Statistic("Error of losers", "less the reference's"),
        "margin": Statistic("Margin", "−beta / 2 d"),
        **NORM_RATIO,
    }

    @classmethod
    def check(cls, config, family: type[PatchedPipeline]) -> None:
        check_steps(config, "dpo")
        sample, size = config.sample, config.sample.num_image_per_prompt
        of_rank = sample.train_batch_size * sample.num_batches_per_epoch
        if size < 2 or of_rank % size:
            raise ValueError(
                f"config.sample.num_image_per_prompt={size} with {of_rank} images of a rank ("
                f"sample.train_batch_size {sample.train_batch_size} x sample.num_batches_per_epoch "
                f"{sample.num_batches_per_epoch}): a pair is the best and the worst of a group, so "
                f"every rank needs whole groups of at least 2. Make it a divisor of {of_rank}."
            )
        micro = config.train.batch_size or sample.train_batch_size
        if micro % 2:
            key = "train.batch_size" if config.train.batch_size else "sample.train_batch_size"
            raise ValueError(
                f"config.{key}={micro}: a micro-batch holds whole pairs, so it must be even. Set "
                f"config.train.batch_size to an even number."
            )

    def __init__(self, config, schedule):
        super().__init__(config, schedule)
        self.beta, self.ref_update_step = config.train.beta, config.train.ref_update_step
        times, steps, density = config.dpo.num_times, config.dpo.steps, config.dpo.density
        self.noising = Noising(times, tuple(steps), density, levels_of="group", noise_of="group")
        self.share = 2 / config.sample.num_image_per_prompt

    def samples_with(self, epoch: int, num_updates: int) -> str:
        return "reference"

    def arrange(self, scores: Tensor, rows: RowTable, plan: Plan, epoch: int) -> Arranged:
        of_ranks = [rows.of_rank(rank) for rank in range(plan.world_size)]
        pairs = [best_and_worst(scores, rows.group, mine) for mine in of_ranks]
        advantages, weights = scores.new_zeros(2, len(rows))
        for best, worst in (pair for of_rank in pairs for pair in of_rank):
            advantages[best], advantages[worst] = 1, -1
            weights[[best, worst]] = 1
        return Arranged(plan.in_sets(pairs, of_ranks, epoch), advantages, weights)

    def points(self, rows: Rollout, randomness: Randomness) -> list[Point]:
        return self.noising.points(rows, self.schedule, randomness)

    def freeze(self, micros: list[Micro], predict: Predict) -> dict[str, Values]:
        return {"reference": predict(micros, "reference")}

    def loss(self, velocity: Tensor, known: dict[str, Tensor], rows: Rollout, point: Point) -> Loss:
        improved = error(velocity, rows, point) - error(known["reference"], rows, point)
        winner, loser = improved[0::2], improved[1::2]
        margin = -self.beta / 2 * (winner - loser)
        stats = {
            "accuracy": (winner < loser).float(),
            "winner_error": winner,
            "loser_error": loser,
            "margin": margin,
        }
        stats = {name: value.detach().repeat_interleave(2) for name, value in stats.items()}
        stats["norm_ratio"] = norm_ratio(velocity, known["reference"])
        return Loss(-logsigmoid(margin).repeat_interleave(2), stats)

    def passes(self, num_kept: float) -> Passes:
        points = len(self.noising)
        return Passes(points, points, 0, share=self.share, reference=(points, 0))

    def after_update(
        self, snapshots: Snapshots, num_updates: int, metrics: dict[str, float]
    ) -> None:
        refresh(snapshots, "reference", self.ref_update_step, num_updates)


def best_and_worst(scores: Tensor, group: Tensor, rows: np.ndarray) -> list[np.ndarray]:
    """Pair each group's first best and first worst of these rows; equal scores make no pair.

    scores: (N,), NaN where missing. group: (N,) int64. rows: numbers of these.
    """
    pairs = []
    for each in dict.fromkeys(group[rows].tolist()):
        scored = [n for n in rows.tolist() if group[n] == each and not scores[n].isnan()]
        best, worst = (pick(scored, key=scores.__getitem__, default=0) for pick in (max, min))
        if scores[best] > scores[worst]:
            pairs.append(np.array([best, worst]))
    return pairs
