"""Everything that an evaluation or a running training holds, and what its phases share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import ml_collections
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from flow_grpo import window
from flow_grpo.conditioning import Conditioner, collate
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.objectives.base import Objective, Predict
from flow_grpo.rewards.combine import Scorer
from flow_grpo.rollout import Point, PromptBatch, Rollout, Size
from flow_grpo.sampling import Sampler
from flow_grpo.training.optimizer import Updater
from flow_grpo.training.plan import Plan
from flow_grpo.training.prompts import Prompt
from flow_grpo.training.snapshots import Snapshots, ema_decay
from flow_grpo.training.stop import Stop, Stopped
from flow_grpo.training.tracking import Timer, Tracker

PATIENCE_S = 60.0  # for scores, beyond config.reward_timeout for each reward


@dataclass
class Evaluator:
    """What drawing and scoring pictures takes, with or without a training around it."""

    config: ml_collections.ConfigDict
    accelerator: Accelerator
    pipeline: PatchedPipeline
    model: nn.Module  # the transformer as accelerate wrapped it
    size: Size
    eval_sampler: Sampler
    conditioner: Conditioner
    scorer: Scorer
    stop: Stop

    def prompt_batch(
        self, prompts: list[Prompt], rows: list[tuple[int, int]], guidance_scale: float
    ) -> PromptBatch:
        """Encode a call's prompts. rows: the (group, member) of each."""
        distinct = list(dict.fromkeys(prompts))
        images = {prompt: prompt.load_images() for prompt in distinct}
        conds = [self.conditioner.cond(p.text, p.images, images[p]) for p in distinct]
        negatives = None
        if self.pipeline.needs_negative(guidance_scale):
            negatives = [self.conditioner.negative(p.images, images[p]) for p in distinct]
        self.conditioner.rest()
        group, member = torch.tensor(rows).unbind(1)
        return PromptBatch(
            conds=conds,
            negatives=negatives,
            index=torch.tensor([distinct.index(prompt) for prompt in prompts]),
            group=group,
            member=member,
            size=self.size,
            prompts=[prompt.text for prompt in prompts],
            metadata=[prompt.metadata for prompt in prompts],
            references=[images[prompt] for prompt in prompts] if any(images.values()) else None,
        )

    def total(self, value: Tensor) -> Tensor:
        """Sum over ranks."""
        return self.accelerator.reduce(value, "sum")

    def scores(self, pending: list[Future]) -> list[dict[str, np.ndarray]]:
        """Wait for scores, a dict of (B,) for each future, of equal keys on all ranks.

        Raises Stopped, on all ranks, where one failed.
        """
        failure, scores = "", []
        patience_s = PATIENCE_S + self.config.reward_timeout * self.scorer.num_rewards
        for future in pending:
            try:
                scores.append(future.result(patience_s))
            except FutureTimeout:
                failure = f"the rewards gave no scores for {patience_s:g} s"
            except RuntimeError as error:
                failure = str(error)
            if failure:
                break
        names = list(dict.fromkeys(name for part in scores for name in part))
        world = gather_object([(failure, names)])
        if failures := [each for each, _ in world if each]:
            raise Stopped(failures[0])
        names = dict.fromkeys(name for _, each in world for name in each)
        return [_complete(part, names) for part in scores]

    def check_masked(self, average: np.ndarray) -> None:
        """Stop where too few of an epoch's pictures have a score. average: (N,) of this rank."""
        counts = [float(np.isnan(average).sum()), float(len(average))]
        masked, total = self.total(torch.tensor(counts, device=self.accelerator.device)).tolist()
        if masked > self.config.max_masked_fraction * total:
            raise Stopped(
                f"{masked:.0f} of {total:.0f} pictures could not be scored, more than "
                f"config.max_masked_fraction={self.config.max_masked_fraction} of them"
                + (f"; {self.scorer.last_masked}" if self.scorer.last_masked else "")
            )


@dataclass
class Run(Evaluator):
    """Built once (build.py); only the last fields change."""

    plan: Plan
    identity: dict
    folder: Path
    sampler: Sampler
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
        rows = cache(lambda: collate(self.pipeline, micro.batch, self.sampler.pad_to))
        scale = self.sampler.guidance_scale
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
        return window.trained_steps(
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
            num_trained=self.trained_steps([0]).shape[1],
            guided=self.pipeline.needs_negative(self.sampler.guidance_scale),
            num_anchors=len(self.objective.anchors),
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


def _complete(scores: dict[str, np.ndarray], names: Iterable[str]) -> dict[str, np.ndarray]:
    """Add the columns that a reward left out when it failed."""
    missing = np.full(len(scores["avg"]), np.nan)
    return {name: scores.get(name, missing) for name in names}
