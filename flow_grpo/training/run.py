"""Everything that a running training holds, and what its phases share."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import ml_collections
import numpy as np
import torch
from torch import Tensor, nn

from flow_grpo import rollouts, sde, windows
from flow_grpo.conditioning import collate, guidances
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.evaluation.evaluate import Evaluator
from flow_grpo.objectives.base import Micro, Objective, Values, Velocity
from flow_grpo.parallel.engine import Engine, Ranks
from flow_grpo.plan import Part, Plan
from flow_grpo.prompts import Prompt, rollout_rows
from flow_grpo.records import Guidance, Point, PromptBatch, Rollout
from flow_grpo.rollouts import Call, Row
from flow_grpo.sampling import Schedule
from flow_grpo.training.claim import Claim
from flow_grpo.training.optimizer import Updater
from flow_grpo.training.snapshots import Held, Snapshots, ema_decay
from flow_grpo.training.tracking import Timer, Tracker


def trained_steps(
    config: ml_collections.ConfigDict, plan: Plan, groups: Iterable[int], epoch: int
) -> np.ndarray:
    return windows.trained_steps(config.sample, groups, config.seed, epoch, plan.num_groups)


def calls(
    config: ml_collections.ConfigDict,
    plan: Plan,
    objective: Objective,
    rank: int,
    epoch: int,
    part: Part | None = None,
) -> list[Call]:
    """Return a rank's calls of denoise() in an epoch; every rank knows those of all.

    part: None: what every epoch draws. Pictures of several sizes share no call.
    """
    sample, part = config.sample, part or plan.whole(config.sample)
    batches = rollout_rows(rank, part.num_batches, sample.train_batch_size, plan.group_size)
    rows = [[(part.first + group, member) for group, member in batch] for batch in batches]
    sizes = plan.sizes_of((batch[0][0] for batch in rows), epoch)
    found: list[Call] = []
    for _, run in itertools.groupby(zip(sizes, rows, strict=True), key=lambda each: each[0]):
        own = [batch for _, batch in run]
        drawn = objective.rollout(own, lambda groups: trained_steps(config, plan, groups, epoch))
        num_rows = sum(len(call.rows) for call in found)
        found += [call.behind(num_rows) for call in drawn]
    return found


def passes(
    config: ml_collections.ConfigDict,
    plan: Plan,
    objective: Objective,
    pipeline: PatchedPipeline,
    epoch: int,
) -> dict[str, int]:
    """Count an epoch's passes of one image through the transformer, on all ranks."""
    guided = guidances(config)
    world = [calls(config, plan, objective, rank, epoch) for rank in range(plan.world_size)]
    of_all = [call for of_rank in world for call in of_rank]
    num_kept = sum(int(call.segment.stochastic.sum()) for call in of_all)
    return plan.passes(
        config,
        objective.passes(num_kept / (plan.num_groups * plan.group_size)),
        guided=pipeline.needs_negative(guided.training),
        guides_reference=guided.reference and pipeline.needs_negative(guided.reference),
        num_sampled=rollouts.num_forwards(of_all) if config.sample.source == "model" else 0,
    )


@dataclass
class Run:
    """Built once (build.py); only the last fields change."""

    config: ml_collections.ConfigDict
    plan: Plan
    identity: dict
    folder: Path
    evaluator: Evaluator
    schedule: Schedule
    guidance: Guidance
    objective: Objective
    engine: Engine
    updater: Updater
    snapshots: Snapshots
    tracker: Tracker
    epoch: int = 0  # finished epochs
    saved: tuple[int, int] | None = None  # epoch and update of the last checkpoint
    in_update: bool = False  # from an epoch's first optimizer step to its end
    held: Held | None = None  # the start of an epoch that is in update
    timer: Timer = field(init=False)  # which tells the other ranks, too
    claim: Claim | None = None  # of the folder
    reference_guidance: Guidance | None = None  # None: as trained
    again: str = ""  # the command that continues the run

    def __post_init__(self):
        self.objective.gather = self.ranks.gather_objects
        self.timer = Timer(told=self._tell)

    def _tell(self, phase: str) -> None:
        self.ranks.watch.phase = f"{phase} of epoch {self.epoch}"

    @property
    def ranks(self) -> Ranks:
        return self.engine.ranks

    @property
    def pipeline(self) -> PatchedPipeline:
        return self.evaluator.pipeline

    @property
    def model(self) -> nn.Module:
        """The transformer as the engine wrapped it."""
        return self.evaluator.model

    def prompt_batch(self, prompts: list[Prompt], rows: list[Row]) -> PromptBatch:
        """Encode a call's prompts, for the reference's guidance too."""
        return self.evaluator.prompt_batch(prompts, rows, self.guidance, self.reference_guidance)

    def predictor(self, rows: Rollout) -> Velocity:
        """Return the velocity of these rows at any point, or at stacked ones; collates once."""

        once = collate(self.pipeline, rows.batch, self.schedule.pad_to)

        def velocity(point: Point, guidance: Guidance | None = None) -> Tensor:
            conditioning = once.repeated(len(point.latents) // len(rows))
            guided = replace(conditioning, guidance=guidance or self.trained_guidance)
            return self.pipeline.velocity(self.model, point.latents, point.sigma, guided)

        return velocity

    @property
    def trained_guidance(self) -> Guidance:
        """The guidance that training predicts with: the rollout's, or none with train.cfg=False."""
        guided = self.pipeline.needs_negative(self.guidance)
        return self.pipeline.unguided if guided and not self.config.train.cfg else self.guidance

    @torch.no_grad()
    def predict(
        self, micros: list[Micro], weights: str = "policy", guidance: Guidance | None = None
    ) -> Values:
        """Return all velocities; never between the policy's forward and its backward."""
        found: Values = []
        if weights == "reference":
            guidance = guidance or self.reference_guidance
        with self.snapshots.using(weights):
            for micro in micros:
                found.append([])
                for ks in self.stacks(len(micro.points)):
                    self.evaluator.stop.poll()
                    stacked = Point.stacked([micro.points[k] for k in ks])
                    found[-1] += micro.velocity(stacked, guidance).chunk(len(ks))
        return found

    def stacks(self, num_points: int) -> list[range]:
        """Cut a micro-batch's points into those that share a forward, and a backward."""
        most = self.config.train.stacked_points
        return [range(i, min(i + most, num_points)) for i in range(0, num_points, most)]

    def trained_steps(self, groups: Iterable[int], epoch: int) -> np.ndarray:
        return trained_steps(self.config, self.plan, groups, epoch)

    def calls(self, rank: int, epoch: int, part: Part | None = None) -> list[Call]:
        return calls(self.config, self.plan, self.objective, rank, epoch, part)

    def passes(self) -> dict[str, int]:
        return passes(self.config, self.plan, self.objective, self.pipeline, self.epoch)

    def excess_noise(self) -> float:
        """Return by how much a stochastic step's noise exceeds the next sigma, at most.

        The model takes such a state for one of that sigma; images are scored with what is left.
        """
        schedule = self.schedule
        if schedule.kind == "ode" or schedule.noise_level == 0:
            return 0.0
        steps = torch.from_numpy(self.trained_steps(range(self.plan.num_groups), self.epoch))
        found = []
        for sigmas in schedule.of_size.values() or [schedule.sigmas]:
            sigmas = sigmas.double().cpu()
            now, then = sigmas[:-1][steps.unique()], sigmas[1:][steps.unique()]
            left = sde.leftover_noise(schedule.kind, now, then, schedule.noise_level, sigmas[1])
            found.append((left - then).max().item())
        return max(found)

    def move_snapshots(self, metrics: dict[str, float]) -> None:
        """Let the average follow every ema_update_every-th update, and the objective its own."""
        train, done = self.config.train, self.updater.num_updates
        if train.ema and done % train.ema_update_every == 0:
            self.snapshots.update("ema", ema_decay(train.ema_decay, done - 1))
        self.objective.after_update(self.snapshots, done, metrics)

    def close(self) -> None:
        """End what it started, and let its folder go."""
        self.evaluator.scorer.close()
        self.tracker.close()
        if self.claim:
            self.claim.release()

    def log(self, kind: str, metrics: dict[str, float]) -> None:
        self.tracker.log(kind, self.epoch, self.updater.num_updates, metrics)
