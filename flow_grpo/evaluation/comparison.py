"""Draw the same images by a patched pipeline and by the stock one that it was made from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flow_grpo import sde
from flow_grpo.conditioning import Conditioner, collate
from flow_grpo.diffusers_patch import stock
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.randomness import Randomness
from flow_grpo.records import Guidance, PromptBatch, Rollout, Size
from flow_grpo.rollouts import Row, whole
from flow_grpo.sampling import Schedule, decode, denoise

RANDOMNESS = Randomness(seed=7, coordinates=(3,))
Images = tuple[list[Tensor], list[np.ndarray]]  # latents, of which the last count, and uint8 images


@dataclass(frozen=True)
class Task:
    prompts: tuple[str, ...]
    images: tuple[np.ndarray, ...]  # the reference images, uint8 (H, W, 3), of every prompt
    size: Size
    num_steps: int
    guidance: Guidance
    max_length: int  # tokens

    def schedule(self, pipeline: PatchedPipeline, kind: str = "ode", pad_to: int = 0) -> Schedule:
        sigmas = pipeline.sigmas(self.num_steps, self.size).to(pipeline.device)
        return Schedule(sigmas, kind, sde.KERNELS[kind].default_level, pad_to=pad_to)

    def batch(self, pipeline: PatchedPipeline, rows: list[int]) -> PromptBatch:
        """Condition a row on each of these prompts; a row's number is its group."""
        texts = [self.prompts[row] for row in rows]
        encoder = Conditioner(pipeline, self.max_length)
        return PromptBatch(
            branches=encoder.branches([(t, (), self.images) for t in texts], self.guidance),
            guidance=self.guidance,
            index=torch.arange(len(rows)),
            owners=[Row(row, 0) for row in rows],
            size=self.size,
            prompts=texts,
            metadata=[{}] * len(rows),
        )


def initial_noise(pipeline: PatchedPipeline, size: Size, rows: list[int]) -> Tensor:
    """Return the noise (B, ...) from which sample() starts with RANDOMNESS, on the device."""
    owners = [(row, 0) for row in rows]
    return RANDOMNESS.normal("init", owners, pipeline.noise_shape(size)).to(pipeline.device)


def call_stock(
    pipeline: PatchedPipeline, task: Task, noise: Tensor, decode: bool = True, **given
) -> Images:
    """Do a task by the stock pipeline, from `noise`; see stock.call()."""
    return stock.call(
        pipeline,
        task.size,
        task.guidance,
        noise,
        task.images,
        num_steps=task.num_steps,
        max_length=task.max_length,
        decode=decode,
        **given,
    )


def draw(
    pipeline: PatchedPipeline, batch: PromptBatch, schedule: Schedule, keep: Collection[str] = ()
) -> Rollout:
    """Draw from RANDOMNESS; all steps but the last are stochastic, of the schedule's kind."""
    segment = whole(np.tile(np.arange(schedule.num_steps - 1), (len(batch), 1)), schedule.num_steps)
    model = pipeline.transformer
    return denoise(pipeline, model, batch, schedule, RANDOMNESS, segment, keep=keep).rollout


def generate(pipeline: PatchedPipeline, task: Task, row: int) -> Images:
    """Draw a prompt alone, without noise on the way and without padding, as a stock call does."""
    rollout = draw(pipeline, task.batch(pipeline, [row]), task.schedule(pipeline))
    return [rollout.final], decode(pipeline, rollout)


@torch.no_grad()
def step_by_step(
    pipeline: PatchedPipeline, task: Task, row: int, states: list[Tensor], times: list
) -> float:
    """Repeat each step of a stock call from where the stock pipeline stood.

    states: the latents after its steps. times: what it told the transformer, which some round to 16
    bits. Returns the largest difference, relative in rms. Unlike that of two whole trajectories it
    does not grow from step to step.
    """
    batch, schedule = task.batch(pipeline, [row]), task.schedule(pipeline)
    conditioning = collate(pipeline, batch, schedule.pad_to)
    noise = initial_noise(pipeline, task.size, [row]).to(pipeline.input_dtype)
    before, worst = pipeline.initial_latents(task.size, noise), 0.0
    with stock.told(pipeline.transformer, times):
        for i, after in enumerate(states):
            sigma, latents = schedule.sigmas[i : i + 1], before.float()
            velocity = pipeline.velocity(pipeline.transformer, latents, sigma, conditioning)
            ours = latents + (schedule.sigmas[i + 1] - sigma) * velocity
            before, worst = after, max(worst, relative(ours, after))
    return worst


def relative(found: Tensor, wanted: Tensor) -> float:
    """Return the rms of a difference over that of what was wanted."""
    wanted = wanted.float()
    return ((found.float() - wanted).norm() / wanted.norm()).item()
