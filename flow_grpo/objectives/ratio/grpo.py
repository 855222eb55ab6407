"""Flow-GRPO (arXiv:2505.05470): a clipped policy gradient over the trained denoising steps."""

from typing import NamedTuple

import torch
from torch import Tensor

from flow_grpo import sde
from flow_grpo.conditioning import guidances
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.objectives.base import Micro, Objective, Predict, Values
from flow_grpo.objectives.norms import norm_ratio
from flow_grpo.objectives.ratio import terms
from flow_grpo.plan import Passes
from flow_grpo.randomness import Randomness
from flow_grpo.records import Loss, Point, Rollout, Size
from flow_grpo.sampling import Schedule, replay


class OldStep(NamedTuple):
    """A step under the weights that sampled, of B rows."""

    log_prob: Tensor  # (B,)
    mean: Tensor | None  # (B, ...), if an objective keeps means


class GRPO(Objective):
    """max(-A r, -A clip(r, 1 +- clip_range)) with r = exp(log_prob - old_log_prob), plus beta KL.

    train.kl_mode: see terms.kl(). Another surrogate of the same steps is a subclass's surrogate().
    """

    keys = terms.KEYS
    keeps = ("states", "log_probs")
    statistics = terms.STATISTICS

    @classmethod
    def check(cls, config, family: type[PatchedPipeline]) -> None:
        sample, train = config.sample, config.train
        differs = train.batch_size not in (None, sample.train_batch_size)
        if train.old_log_prob == "rollout" and differs:
            raise ValueError(
                f"config.train.batch_size={train.batch_size} differs from config.sample."
                f"train_batch_size={sample.train_batch_size}: the same rows then give other bits. "
                f"Set config.train.old_log_prob=replay, or make the two equal."
            )
        if train.old_log_prob == "rollout" and train.stacked_points > 1:
            raise ValueError(
                f"config.train.stacked_points={train.stacked_points} predicts in larger calls than "
                f"those that sampled, which gives other bits. Set config.train.old_log_prob=replay,"
                f" or config.train.stacked_points=1."
            )
        if family.may_need_negative(guidances(config).training) and not train.cfg:
            raise ValueError(
                f"config.train.cfg=False with config.sample.guidance_scale={sample.guidance_scale}"
                f": the trained policy would not be the one that sampled. Set config.train.cfg=True"
                f" or config.sample.guidance_scale={family.unguided.scale:g}."
            )
        most = sde.KERNELS[sample.sde_type].max_level
        if not 0 < sample.noise_level <= most:
            raise ValueError(
                f"config.sample.noise_level={sample.noise_level}: {sample.sde_type} takes values "
                f"in (0, {most:g}], as a step without noise has no log-probability. A positive "
                f"number is needed, 0.7 for example; or change config.sample.sde_type."
            )
        if train.reward_kl and sample.branching in ("strides", "tree"):
            raise ValueError(
                f"config.train.reward_kl={train.reward_kl} with config.sample.branching="
                f"{sample.branching}, where images share steps and none has a KL of its own. Set "
                f"config.train.beta instead, or another config.sample.branching."
            )

    def __init__(self, config, schedule: Schedule):
        super().__init__(config, schedule)
        train = config.train
        self.beta = train.beta
        self.replays = train.old_log_prob == "replay"
        self.reward_kl = train.reward_kl
        if self.reward_kl:
            self.keeps = (*self.keeps, "velocities")
        if self.beta or self.reward_kl:
            self.snapshots = ("reference",)
        self._step_weights: dict[Size, Tensor | None] = {}

    def reference_kl(self, micros: list[Micro], predict: Predict) -> list[Tensor]:
        found = []
        for micro, references in zip(micros, predict(micros, "reference"), strict=True):
            of_points = []
            for point, reference in zip(micro.points, references, strict=True):
                sampled = micro.rows.velocities[:, point.column]
                of_points.append(self._kl(micro.rows, point, sampled, reference))
            found.append(torch.stack(of_points).mean(0))
        return found

    def points(self, rows: Rollout, randomness: Randomness) -> list[Point]:
        return terms.kept_points(rows, self.schedule)

    def prepare(self, micros: list[Micro], predict: Predict) -> dict[str, Values]:
        if not self.replays:
            return {}
        steps = [
            [
                replay(self.schedule, micro.rows, point.column, velocity)
                for point, velocity in zip(micro.points, velocities, strict=True)
            ]
            for micro, velocities in zip(micros, predict(micros), strict=True)
        ]
        old = {"old_log_prob": [[step.log_prob for step in of_points] for of_points in steps]}
        if "means" in self.keeps:
            old["old_mean"] = [[step.mean for step in of_points] for of_points in steps]
        return old

    def freeze(self, micros: list[Micro], predict: Predict) -> dict[str, Values]:
        return {"reference": predict(micros, "reference")} if self.beta else {}

    def loss(self, velocity: Tensor, known: dict[str, Tensor], rows: Rollout, point: Point) -> Loss:
        step = replay(self.schedule, rows, point.column, velocity)
        value, stats = self.surrogate(step, self._old(known, rows, point), rows, point)
        if (weights := self.step_weights(rows.batch.size)) is not None:
            value = value * weights[point.step]
        if self.beta:
            kl = self._kl(rows, point, velocity, known["reference"], step)
            value = value + self.beta * kl
            stats |= {"kl": kl.detach(), "norm_ratio": norm_ratio(velocity, known["reference"])}
        return Loss(value, stats)

    def step_weights(self, size: Size) -> Tensor | None:
        """Return the factor of each step's loss in pictures of a size; see terms.step_weights()."""
        if size not in self._step_weights:
            schedule = self.schedule.at(size)
            self._step_weights[size] = terms.step_weights(self.train.step_weight, schedule)
        return self._step_weights[size]

    def _kl(
        self,
        rows: Rollout,
        point: Point,
        velocity: Tensor,
        reference: Tensor,
        step: sde.Step | None = None,
    ) -> Tensor:
        step = step or replay(self.schedule, rows, point.column, velocity)
        mode = self.train.kl_mode
        return terms.kl(mode, self.schedule, rows, point, step, velocity, reference)

    def surrogate(
        self, step: sde.Step, old: OldStep, rows: Rollout, point: Point
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the policy loss of B rows at one step, and its statistics, (B,) each.

        step: under the trained policy, with a gradient.
        """
        log_ratio = (step.log_prob - old.log_prob).clamp(-20, 20)
        bounds = terms.clip_bounds(self.train, sde.of_a_nat(self.schedule.kind, step))
        return terms.clipped_surrogate(log_ratio, rows.at("advantages", point.column), *bounds)

    def _old(self, known: dict[str, Tensor], rows: Rollout, point: Point) -> OldStep:
        if self.replays:
            return OldStep(known["old_log_prob"], known.get("old_mean"))
        mean = None if rows.means is None else rows.means[:, point.column]
        return OldStep(rows.log_probs[:, point.column], mean)

    def passes(self, num_kept: float) -> Passes:
        by_reference = num_kept * bool(self.beta), num_kept * bool(self.reward_kl)
        before = num_kept * self.replays + by_reference[1]
        return Passes(num_kept, by_reference[0], before, reference=by_reference)

    def gate_limits(self) -> dict[str, float]:
        if self.replays:
            return {"velocity": self.train.gate_tolerance}
        return self.clip_limits()

    def clip_limits(self) -> dict[str, float]:
        """Bound how far the start may be from a ratio of 1: to a tenth of where it is clipped."""
        if self.train.clip_nats:
            return {"nats": self.train.clip_nats / 10}
        return {"log_ratio": min(terms.clip_bounds(self.train, 0.0)) / 10}
