"""Draw the same pictures by a patched pipeline and by the stock one that it was made from."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from flow_grpo import sde
from flow_grpo.conditioning import collate
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.randomness import Randomness
from flow_grpo.records import PromptBatch, Rollout, Size
from flow_grpo.rollouts import Row, whole
from flow_grpo.sampling import Schedule, decode, denoise

RANDOMNESS = Randomness(seed=7, coordinates=(3,))


@dataclass(frozen=True)
class Task:
    """What is drawn."""

    prompts: tuple[str, ...]
    images: tuple[np.ndarray, ...]  # the reference pictures, uint8 (H, W, 3), of every prompt
    size: Size
    num_steps: int
    guidance_scale: float
    max_length: int  # tokens

    def unguided(self, pipeline: PatchedPipeline) -> Task:
        return replace(self, guidance_scale=pipeline.unguided_scale)

    def schedule(self, pipeline: PatchedPipeline, kind: str = "ode", pad_to: int = 0) -> Schedule:
        sigmas = pipeline.sigmas(self.num_steps, self.size).to(pipeline.device)
        level = sde.KERNELS[kind].default_level
        return Schedule(sigmas, self.guidance_scale, kind, level, pad_to=pad_to)

    def batch(self, pipeline: PatchedPipeline, rows: list[int]) -> PromptBatch:
        """Condition a row on each of these prompts; a row's number is its group."""
        texts = [self.prompts[row] for row in rows]
        negatives = None
        if pipeline.needs_negative(self.guidance_scale):
            negatives = [pipeline.negative(self.images, self.max_length)] * len(rows)
        return PromptBatch(
            conds=[pipeline.encode([text], [self.images], self.max_length)[0] for text in texts],
            negatives=negatives,
            index=torch.arange(len(rows)),
            owners=[Row(row, 0) for row in rows],
            size=self.size,
            prompts=texts,
            metadata=[{}] * len(rows),
        )


@contextmanager
def timesteps(transformer: nn.Module) -> Iterator[list]:
    """List what the transformer is told of the time: outputs can hide a wrong last bit."""
    seen = []

    def note(module: nn.Module, args: tuple, inputs: dict) -> None:
        told = args[1] if args else inputs["timestep"]
        seen.append(told.float().tolist())

    hook = transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def stock_vae(pipeline: PatchedPipeline) -> Iterator[None]:
    """Put a VAE in place as the stock pipeline needs it, of the transformer's precision."""
    own = pipeline.pipe.vae
    if own.dtype != pipeline.input_dtype:
        pipeline.pipe.vae = copy.deepcopy(own).to(pipeline.input_dtype)
    try:
        yield
    finally:
        pipeline.pipe.vae = own


def initial_noise(pipeline: PatchedPipeline, size: Size, rows: list[int]) -> Tensor:
    """Return the noise (B, ...) from which sample() starts with RANDOMNESS, on the device."""
    owners = [(row, 0) for row in rows]
    return RANDOMNESS.normal("init", owners, pipeline.noise_shape(size)).to(pipeline.device)


def call_stock(
    pipeline: PatchedPipeline, task: Task, noise: Tensor, decode: bool = True, **given
) -> tuple[list[Tensor], list[np.ndarray]]:
    """Call the stock pipeline on `noise`; return the latents after each step, and uint8 pictures.

    decode: False gives no pictures. given: its prompt, or embeddings, and what else is to differ.
    """
    seen: list[Tensor] = []
    stock = pipeline.stock_arguments(task.size, task.guidance_scale, noise, task.images)
    if "prompt_embeds" in given:
        stock.pop("negative_prompt", None)  # it comes as embeddings too
    pictures = pipeline.pipe(
        num_inference_steps=task.num_steps,
        max_sequence_length=task.max_length,
        callback_on_step_end=lambda pipe, step, time, now: seen.append(now["latents"]) or {},
        output_type="pil" if decode else "latent",
        return_dict=False,
        **(stock | given),
    )[0]
    return seen, [np.asarray(picture) for picture in pictures] if decode else []


class Drawn(NamedTuple):
    rollout: Rollout
    images: list[np.ndarray]


def generate(pipeline: PatchedPipeline, task: Task, row: int) -> Drawn:
    """Draw a prompt alone, without noise on the way and without padding, as a stock call does."""
    batch, schedule = task.batch(pipeline, [row]), task.schedule(pipeline)
    segment = whole(np.empty((1, 0), dtype=np.int64), task.num_steps)
    part = denoise(pipeline, pipeline.transformer, batch, schedule, RANDOMNESS, segment)
    return Drawn(part.rollout, decode(pipeline, part.rollout))


@torch.no_grad()
def step_by_step(pipeline: PatchedPipeline, task: Task, row: int, states: list[Tensor]) -> float:
    """Repeat each step of a stock call from where the stock pipeline stood.

    states: the latents after its steps. Returns the largest difference, relative in rms. Unlike
    that of two whole trajectories it does not grow from step to step.
    """
    batch, schedule = task.batch(pipeline, [row]), task.schedule(pipeline)
    cond, negative = collate(pipeline, batch, schedule.pad_to)
    noise = initial_noise(pipeline, task.size, [row]).to(pipeline.input_dtype)
    before, worst = pipeline.initial_latents(task.size, noise), 0.0
    for i, after in enumerate(states):
        sigma, latents = schedule.sigmas[i : i + 1], before.float()
        inputs = latents, sigma, cond, negative, task.guidance_scale, task.size
        velocity = pipeline.velocity(pipeline.transformer, *inputs)
        ours = latents + (schedule.sigmas[i + 1] - sigma) * velocity
        before, worst = after, max(worst, relative(ours, after))
    return worst


def relative(found: Tensor, wanted: Tensor) -> float:
    """Return the rms of a difference over that of what was wanted."""
    wanted = wanted.float()
    return ((found.float() - wanted).norm() / wanted.norm()).item()
