"""The denoising loop with log-probabilities, and the same step scored again for the gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flow_grpo import sde
from flow_grpo.conditioning import collate
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.randomness import Randomness
from flow_grpo.records import PromptBatch, Rollout


@dataclass(frozen=True)
class Schedule:
    """How pictures are drawn: what sample(), replay() and an objective must agree on."""

    sigmas: Tensor  # (N + 1,) fp32 on the device, 1 ... 0
    kind: str = "ode"  # of the stochastic steps
    noise_level: float = 0.0
    same_latent: bool = False
    pad_to: int = 0  # tokens

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1


@torch.no_grad()
def sample(
    pipeline: PatchedPipeline,
    model: Callable,
    batch: PromptBatch,
    schedule: Schedule,
    randomness: Randomness,
    steps: np.ndarray | None = None,
    keep_steps: bool = True,
    on_step: Callable[[], None] = lambda: None,
) -> Rollout:
    """Generate a picture for each row.

    model: the transformer as training calls it. steps: (B, K) int64 ascending, the stochastic steps
    of each row; None or noise_level 0: an ODE throughout. keep_steps: return their states and
    log-probs. Every call makes the same number of forward passes, whatever the rows' steps.
    """
    sigmas, owners = (
        schedule.sigmas,
        list(zip(batch.group.tolist(), batch.member.tolist(), strict=True)),
    )
    conditioning = collate(pipeline, batch, schedule.pad_to)
    firsts = [(group, 0) for group, _ in owners] if schedule.same_latent else owners
    noise = randomness.normal("init", firsts, pipeline.noise_shape(batch.size))
    latents = pipeline.initial_latents(batch.size, _send(noise, pipeline.device))
    if steps is None or schedule.kind == "ode" or schedule.noise_level == 0:
        steps = np.empty((len(batch), 0), dtype=np.int64)
    kept = _Kept(latents, steps if keep_steps else steps[:, :0])

    for i in range(schedule.num_steps):
        sigma = sigmas[i].expand(len(batch))
        velocity = pipeline.velocity(model, latents, sigma, conditioning)
        before = latents
        now = (velocity, latents, sigma, sigmas[i + 1])
        latents = sde.step("ode", *now, 0.0, sigma_guard=sigmas[1]).next_latents
        rows = np.flatnonzero((steps == i).any(axis=1))
        if len(rows):
            noise = torch.zeros_like(latents)
            on_rows = _to(latents.device, rows)
            drawn = randomness.normal(
                "step", [(*owners[row], i) for row in rows], latents.shape[1:]
            )
            noise[on_rows] = _send(drawn, latents.device)
            taken = sde.step(
                schedule.kind, *now, schedule.noise_level, sigma_guard=sigmas[1], noise=noise
            )
            latents[on_rows] = taken.next_latents[on_rows]
            kept.store(i, before, latents, taken.log_prob)
        on_step()

    return Rollout(
        batch=batch,
        steps=_to(latents.device, kept.steps),
        latents=kept.latents,
        next_latents=kept.next_latents,
        log_probs=kept.log_probs,
        final=latents,
        images=to_uint8(pipeline.decode(latents, batch.size)),
    )


class _Kept:
    """The states before and after the trained steps (B, K) of each row, and the log-probs."""

    def __init__(self, latents: Tensor, steps: np.ndarray):
        self.steps = steps
        self.latents = latents.new_empty((*steps.shape, *latents.shape[1:]))
        self.next_latents = torch.empty_like(self.latents)
        self.log_probs = latents.new_empty(steps.shape)

    def store(self, step: int, before: Tensor, after: Tensor, log_prob: Tensor) -> None:
        """Keep the rows that train this step."""
        rows, columns = (_to(before.device, index) for index in np.nonzero(self.steps == step))
        self.latents[rows, columns] = before[rows]
        self.next_latents[rows, columns] = after[rows]
        self.log_probs[rows, columns] = log_prob[rows]


def replay(schedule: Schedule, rollout: Rollout, column: int, velocity: Tensor) -> sde.Step:
    """Score the rollout's trained step `column` under another velocity (B, ...) at its state."""
    steps = rollout.steps[:, column]
    return sde.step(
        schedule.kind,
        velocity,
        rollout.latents[:, column],
        schedule.sigmas[steps],
        schedule.sigmas[steps + 1],
        schedule.noise_level,
        sigma_guard=schedule.sigmas[1],
        next_latents=rollout.next_latents[:, column],
    )


def to_uint8(images: Tensor) -> list[np.ndarray]:
    """Turn (B, [F,] 3, H, W) in [0, 1] into B uint8 ([F,] H, W, 3), rounded as diffusers does."""
    return list((images.movedim(-3, -1) * 255).round().to(torch.uint8).cpu().numpy())


def _to(device: torch.device, array: np.ndarray) -> Tensor:
    return _send(torch.from_numpy(np.ascontiguousarray(array)), device)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it, which pageable memory would."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
