"""What must hold for a model before it is trained; docs/add_a_model.md says what each is for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

from flow_grpo import sde
from flow_grpo.conditioning import collate
from flow_grpo.diffusers_patch import stock
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.evaluation.comparison import (
    Images,
    Task,
    call_stock,
    draw,
    generate,
    initial_noise,
    relative,
    step_by_step,
)
from flow_grpo.launch import build
from flow_grpo.records import PromptBatch, Rollout
from flow_grpo.sampling import replay
from flow_grpo.training.snapshots import no_adapter
from flow_grpo.training.tracking import memory

LORA_STD = 0.02  # of B, which a new LoRA has at zero
# The most that latents may differ from the stock pipeline's, in rms: in fp32 at the end; in 16
# bits, in which stock keeps the latents too, after any one step from its own state.
STOCK_BOUND = {torch.float32: 0.0, torch.bfloat16: 0.02, torch.float16: 0.003}
GPU_BOUND = 1e-6  # in fp32: a GPU's matrix product may round by its input's strides
LOG_RATIO_BOUND = {torch.float32: 0.0, torch.bfloat16: 1e-5, torch.float16: 1e-5}


class Check(NamedTuple):
    name: str
    passed: bool
    figures: str

    def __str__(self) -> str:
        return f"{'PASS' if self.passed else 'FAIL'}  {self.name:<40} {self.figures}"


def verify(pipeline: PatchedPipeline, task: Task, config: ConfigDict) -> Iterator[Check]:
    """Check a model as it was loaded; config's LoRA is added to it. task: two prompts or more."""
    unguided = replace(task, guidance=pipeline.unguided)
    yield from stock_checks(pipeline, unguided, "unguided")
    if pipeline.may_need_negative(task.guidance):
        yield from stock_checks(pipeline, task, "guided")
    base = velocity_of(pipeline, task)
    build.add_trained_weights(pipeline, config)
    yield check_reference(pipeline, task, base)
    for kind in sde.STOCHASTIC:
        yield check_log_ratio(pipeline, task, kind)
    yield check_gradient(pipeline, task)
    yield check_export(pipeline, task)


def velocity_of(pipeline: PatchedPipeline, task: Task) -> Tensor:
    """Predict all prompts' velocity at the first step, (B, ...), as training would."""
    rows = list(range(len(task.prompts)))
    latents = pipeline.initial_latents(task.size, initial_noise(pipeline, task.size, rows))
    sigma = task.schedule(pipeline).sigmas[:1].expand(len(rows))
    with torch.no_grad():
        return _predict(pipeline, task, task.batch(pipeline, rows), latents, sigma)


def training_precision(pipeline: PatchedPipeline) -> torch.autocast:
    """Return the autocast under which accelerate lets the transformer run."""
    dtype = pipeline.input_dtype
    return torch.autocast(pipeline.device.type, dtype, enabled=dtype != torch.float32)


def stock_checks(pipeline: PatchedPipeline, task: Task, how: str) -> Iterator[Check]:
    """Compare with the stock pipeline: the schedule, the time, and what comes out without noise."""
    worst_sigma, worst_time, differences = 0.0, 0.0, []
    sigmas = pipeline.sigmas(task.num_steps, task.size)
    decode = pipeline.input_dtype == torch.float32  # stock decodes 16 bits by a 16-bit VAE alone
    for row, prompt in enumerate(task.prompts):
        noise = initial_noise(pipeline, task.size, [row])
        with stock.vae_in_place(pipeline):
            with stock.timesteps(pipeline.transformer) as stock_times:
                theirs = call_stock(pipeline, task, noise, decode, prompt=prompt)
            stock_sigmas = stock.last_sigmas(pipeline)
            with stock.timesteps(pipeline.transformer) as times:
                ours = generate(pipeline, task, row)
            differences.append(
                difference(ours, theirs)
                if decode
                else step_by_step(pipeline, task, row, theirs[0], stock_times)
            )
        worst_sigma = max(worst_sigma, _largest(stock_sigmas, sigmas))
        told, wanted = (np.array([t[0] for t in seen]).ravel() for seen in (times, stock_times))
        worst_time = max(worst_time, _largest(told, wanted))
    bound = stock_bound(pipeline)
    scale = float(np.abs(wanted).max())
    if how == "unguided":
        yield Check(
            "sigmas equal the stock scheduler's",
            worst_sigma == 0,
            f"{len(sigmas)} values, largest difference {worst_sigma:.3g}",
        )
    yield Check(
        f"time the transformer is told, {how}",
        worst_time <= scale * (0 if decode else 0.01),  # stock rounds it in 16 bits
        f"up to {scale:.6g}, largest difference {worst_time:.3g}",
    )
    worst = max(differences)
    yield Check(
        f"noise level 0 is stock, {how}",
        worst <= bound,
        f"guidance {task.guidance.scale:g}, {len(task.prompts)} prompts, "
        f"{task.num_steps} steps: {_outcome(worst, bound)}",
    )


def stock_bound(pipeline: PatchedPipeline) -> float:
    bound = STOCK_BOUND[pipeline.input_dtype]
    return max(bound, GPU_BOUND) if pipeline.device.type == "cuda" else bound


def check_reference(pipeline: PatchedPipeline, task: Task, base: Tensor) -> Check:
    """Compare the model without its adapter with what it was before it had one."""
    randomise_lora(pipeline)
    with no_adapter(pipeline.transformer):
        reference = velocity_of(pipeline, task)
    policy = velocity_of(pipeline, task)
    apart = relative(policy, base)
    worst = _largest(reference, base)
    return Check(
        "reference is the base",
        worst == 0 and apart > 1e-4,
        f"largest difference {worst:.3g}; a random LoRA moves the velocity by {apart:.1%}",
    )


def check_log_ratio(pipeline: PatchedPipeline, task: Task, kind: str) -> Check:
    """Score a rollout's steps again, as training does before its first update."""
    rollout = _rollout(pipeline, task, kind)
    schedule = task.schedule(pipeline, kind, pad_to=task.max_length)
    largest = []
    for column in range(rollout.steps.shape[1]):
        velocity = _trained_velocity(pipeline, task, rollout, column)
        again = replay(schedule, rollout, column, velocity).log_prob.detach()
        largest.append((again - rollout.log_probs[:, column]).abs().max().item())
    bound = LOG_RATIO_BOUND[pipeline.input_dtype]
    return Check(
        f"log-ratio 0 on policy, {kind}",
        all(value <= bound for value in largest),
        f"steps 0-{len(largest) - 1}: {' '.join(f'{value:.2g}' for value in largest)} "
        f"(at most {bound:g})",
    )


def check_gradient(pipeline: PatchedPipeline, task: Task) -> Check:
    """Let a step's log-probability reach every trainable parameter; measure a step's cost."""
    if pipeline.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = {}
    with _timed(pipeline, seconds, "sampling"):
        rollout = _rollout(pipeline, task, "sde")
    seconds["sampling"] /= task.num_steps
    with _timed(pipeline, seconds, "training"):
        velocity = _trained_velocity(pipeline, task, rollout, 0)
        schedule = task.schedule(pipeline, "sde", pad_to=task.max_length)
        (replay(schedule, rollout, 0, velocity).log_prob.sum() * velocity[0].numel()).backward()
    trained = {n: p for n, p in pipeline.transformer.named_parameters() if p.requires_grad}
    deaf = [n for n, p in trained.items() if p.grad is None or not p.grad.any()]
    broken = [n for n, p in trained.items() if p.grad is not None and not p.grad.isfinite().all()]
    pipeline.transformer.zero_grad(set_to_none=True)
    pictures = len(task.prompts)
    cost = ", ".join(f"{name} {value:.3g} s a step" for name, value in seconds.items())
    peak = ", ".join(f"{n.split('/')[1]} {v:.3g}" for n, v in memory().items())
    wrong = "".join(f"; none in {n}" for n in deaf[:3])
    wrong += "".join(f"; not finite in {n}" for n in broken[:3])
    return Check(
        "gradient reaches all that trains",
        bool(trained) and not deaf and not broken,
        f"{len(trained) - len(deaf)} of {len(trained)} tensors{wrong}; "
        f"{pictures} images: {cost}; peak {peak}",
    )


def check_export(pipeline: PatchedPipeline, task: Task) -> Check:
    """Export the LoRA, load it as a user of the stock pipeline does, and draw with both."""
    ours, velocity = generate(pipeline, task, 0), velocity_of(pipeline, task)
    weights = {n: p.detach() for n, p in pipeline.transformer.named_parameters() if "lora_" in n}
    with TemporaryDirectory() as folder, stock.exported_lora(pipeline, weights, Path(folder)):
        if pipeline.input_dtype == torch.float32:
            noise = initial_noise(pipeline, task.size, [0])
            worst = difference(ours, call_stock(pipeline, task, noise, prompt=task.prompts[0]))
        else:
            worst = relative(velocity_of(pipeline, task), velocity)
    apart = relative(generate(pipeline, task, 0)[0][-1], ours[0][-1])
    bound = stock_bound(pipeline)
    return Check(
        "LoRA export gives stock images",
        worst <= bound and apart > 1e-4,
        f"{len(weights)} tensors: {_outcome(worst, bound)}; without it {apart:.1%}",
    )


@torch.no_grad()
def randomise_lora(pipeline: PatchedPipeline) -> None:
    """Give B values, so that the adapter does something and A has a gradient."""
    torch.manual_seed(1)
    for name, param in pipeline.transformer.named_parameters():
        if "lora_B" in name:
            param.normal_(std=LORA_STD)


def difference(ours: Images, theirs: Images) -> float:
    """Return the last latents' difference, relative in rms; inf if only the images differ."""
    apart = relative(ours[0][-1], theirs[0][-1])
    same = all(np.array_equal(*pair) for pair in zip(ours[1], theirs[1], strict=False))
    return apart if same or apart else float("inf")


def _rollout(pipeline: PatchedPipeline, task: Task, kind: str) -> Rollout:
    schedule = task.schedule(pipeline, kind, pad_to=task.max_length)
    batch = task.batch(pipeline, list(range(len(task.prompts))))
    with training_precision(pipeline):
        return draw(pipeline, batch, schedule, keep=("states", "log_probs"))


def _trained_velocity(
    pipeline: PatchedPipeline, task: Task, rollout: Rollout, column: int
) -> Tensor:
    """Predict with a gradient at a rollout's state."""
    sigma = task.schedule(pipeline).sigmas[rollout.steps[:, column]]
    return _predict(pipeline, task, rollout.batch, rollout.latents[:, column].contiguous(), sigma)


def _predict(
    pipeline: PatchedPipeline, task: Task, batch: PromptBatch, latents: Tensor, sigma: Tensor
) -> Tensor:
    conditioning = collate(pipeline, batch, task.max_length)
    with training_precision(pipeline):
        return pipeline.velocity(pipeline.transformer, latents, sigma, conditioning)


@contextmanager
def _timed(pipeline: PatchedPipeline, seconds: dict[str, float], name: str) -> Iterator[None]:
    def now() -> float:
        if pipeline.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    yield
    seconds[name] = now() - start


def _outcome(worst: float, bound: float) -> str:
    if bound == worst == 0:
        return "latents and images equal, bit for bit"
    return f"differs by {worst:.3g} in rms (at most {bound:g})"


def _largest(found: Tensor | np.ndarray, wanted: Tensor | np.ndarray) -> float:
    if len(found) != len(wanted):
        return float("inf")
    return float(abs(found - wanted).max())
