"""Everything that a running training holds, and what its phases share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from flow_grpo import rollouts
from flow_grpo.conditioning import collate
from flow_grpo.evaluation.evaluate import Evaluator
from flow_grpo.objectives.base import Objective, Predict
from flow_grpo.plan import Plan
from flow_grpo.records import Point, Rollout
from flow_grpo.sampling import Schedule
from flow_grpo.training.optimizer import Updater
from flow_grpo.training.snapshots import Snapshots, ema_decay
from flow_grpo.training.tracking import Timer, Tracker


@dataclass
class Run(Evaluator):
    """Built once (build.py); only the last fields change."""

    plan: Plan
    identity: dict
    folder: Path
    schedule: Schedule
    objective: Objective
    updater: Updater
    snapshots: Snapshots
    tracker: Tracker
    epoch: int = 0  # finished epochs
    saved: tuple[int, int] | None = None  # epoch and update of the last checkpoint
    timer: Timer = field(default_factory=Timer)

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        named = self.pipeline.transformer.named_parameters()
        return ((name, param) for name, param in named if param.requires_grad)

    def predictor(self, micro: Rollout) -> Predict:
        """Return the velocity of these rows at any point; the conditioning is collated once."""
        rows = cache(lambda: collate(self.pipeline, micro.batch, self.schedule.pad_to))
        scale = self.schedule.guidance_scale
        if self.pipeline.needs_negative(scale) and not self.config.train.cfg:
            scale = self.pipeline.unguided_scale

        def predict(point: Point) -> Tensor:
            return self.pipeline.velocity(
                self.model, point.latents, point.sigma, *rows(), scale, self.size
            )

        return predict

    @torch.no_grad()
    def frozen(self, name: str, predict: Predict, point: Point) -> Tensor:
        """A snapshot's velocity; never between the policy's forward and its backward."""
        with self.snapshots.using(name):
            return predict(point)

    def trained_steps(self, groups: list[int]) -> np.ndarray:
        """The stochastic steps of rows of these groups in this epoch, (B, K) int64."""
        sample = self.config.sample
        return rollouts.trained_steps(
            sample.num_steps,
            groups,
            size=sample.sde_window_size,
            span=tuple(sample.sde_window_range),
            fixed=tuple(sample.sde_steps),
            seed=self.config.seed,
            epoch=self.epoch,
        )

    def passes(self) -> dict[str, int]:
        """Count an epoch's passes through the transformer, see Plan.passes."""
        return self.plan.passes(
            self.config,
            guided=self.pipeline.needs_negative(self.schedule.guidance_scale),
            num_points=self.objective.num_points(self.trained_steps([0]).shape[1]),
            num_anchors=len(self.objective.anchors),
            num_prepared=self.objective.num_prepared,
        )

    def move_snapshots(self) -> None:
        """Let the average follow every ema_update_every-th update, and the objective its own."""
        train, done = self.config.train, self.updater.num_updates
        if train.ema and done % train.ema_update_every == 0:
            self.snapshots.update("ema", ema_decay(train.ema_decay, done - 1))
        self.objective.after_update(self.snapshots, done)

    def log(self, kind: str, metrics: dict[str, float]) -> None:
        """Write a row of metrics. kind: update | epoch | eval."""
        self.tracker.log(kind, self.epoch, self.updater.num_updates, metrics)
