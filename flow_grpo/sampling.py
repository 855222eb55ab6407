"""The denoising loop with log-probabilities, and the same step scored again for the gradient."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from flow_grpo import sde
from flow_grpo.conditioning import collate
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.randomness import Randomness
from flow_grpo.records import PromptBatch, Rollout, Size
from flow_grpo.rollouts import Segment


@dataclass(frozen=True)
class Schedule:
    """How images are drawn: what denoise(), replay() and an objective must agree on."""

    sigmas: Tensor  # (N + 1,) fp32 on the device, 1 ... 0
    kind: str = "ode"  # of the stochastic steps
    noise_level: float = 0.0
    same_latent: bool = False
    pad_to: int = 0  # tokens
    solver: str = "euler"  # of steps that are not stochastic; or "dpm2"
    of_size: Mapping[Size, Tensor] = field(default_factory=dict)  # see grids()

    def at(self, size: Size) -> Schedule:
        """Return the schedule of one size."""
        return replace(self, sigmas=self.of_size[size], of_size={}) if self.of_size else self

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1


def grids(
    pipeline: PatchedPipeline, num_steps: int, sizes: Iterable[Size]
) -> tuple[Tensor, dict[Size, Tensor]]:
    """Return `sigmas` and `of_size` of a Schedule.

    Where sizes have different sigmas these are in the second, and the first are NaN, so that a loss
    that does not ask at() is no number.
    """
    found = {size: pipeline.sigmas(num_steps, size).to(pipeline.device) for size in sizes}
    first, *others = found.values()
    if all(torch.equal(first, each) for each in others):
        return first, {}
    return torch.full_like(first, torch.nan), found


KEPT = ("states", "log_probs", "means", "velocities")  # of stochastic steps, beside the final state


@dataclass
class Denoised:
    """What one call gives: its rows, and states that later calls go on from."""

    rollout: Rollout
    states: dict[int, Tensor]  # by index of the sigma: (B, ...) fp32 of rows that pass it


@torch.no_grad()
def denoise(
    pipeline: PatchedPipeline,
    model: Callable,
    batch: PromptBatch,
    schedule: Schedule,
    randomness: Randomness,
    segment: Segment,
    *,
    leaf: bool = True,
    keep: Collection[str] = (),
    start: Tensor | None = None,
    save: Collection[int] = (),
    on_step: Callable[[], None] = lambda: None,
) -> Denoised:
    """Walk B rows along their segment, a forward pass a step; nothing is decoded.

    model: the transformer as training calls it. leaf: the rows end as images. keep: of KEPT. start:
    (B, ...) fp32, the states of the rows' parents; used where a row has one. save: indices of
    sigmas whose states are returned. Steps that are not stochastic are the schedule's solver's.
    """
    latents, schedule = _initial(pipeline, batch, schedule, randomness), schedule.at(batch.size)
    device, sigmas = latents.device, schedule.sigmas
    if start is not None:
        goes_on = _to(device, np.flatnonzero(segment.parent[:, 0] >= 0))
        latents[goes_on] = start[goes_on]
    if schedule.kind == "ode" or schedule.noise_level == 0:
        segment = replace(segment, stochastic=np.zeros_like(segment.stochastic))
    conditioning = collate(pipeline, batch, schedule.pad_to)
    grid, kept = _to(device, segment.grid), _room(segment, latents, keep)
    states: dict[int, Tensor] = {}
    solve = {"euler": Euler, "dpm2": Multistep}[schedule.solver](latents)
    for i in range(grid.shape[1] - 1):
        _save(states, segment.grid[:, i], latents, save)
        now, then = sigmas[grid[:, i]], sigmas[grid[:, i + 1]]
        velocity = pipeline.velocity(model, latents, now, conditioning)
        before, place = latents, (velocity, latents, now, then)
        latents = solve(*place)
        if len(chosen := np.flatnonzero(segment.stochastic[:, i])):
            noise = _step_noise(randomness, batch, segment, i, latents)
            taken = sde.step(
                schedule.kind, *place, schedule.noise_level, sigma_guard=sigmas[1], noise=noise
            )
            on_rows = _to(device, chosen)
            solve.forget(on_rows)
            columns = _to(device, segment.stochastic[chosen, :i].sum(1))  # of what is kept
            latents[on_rows] = taken.next_latents[on_rows]
            values = {"latents": before, "next_latents": latents, "log_probs": taken.log_prob}
            values |= {"means": taken.mean, "velocities": velocity}
            for name in kept.keys() & values.keys() if keep else ():
                kept[name][on_rows, columns] = values[name][on_rows]
        on_step()
    _save(states, segment.grid[:, -1], latents, save)
    rollout = Rollout(
        batch=batch,
        final=latents,
        leaf=torch.full((len(batch),), leaf),
        parent=torch.from_numpy(segment.parent),
        **kept,
    )
    return Denoised(rollout, states)


@torch.no_grad()
def keep_up(
    pipeline: PatchedPipeline, model: Callable, rows: Rollout, schedule: Schedule, times: int
) -> None:
    """Make passes that nobody asked for: others make them, and cut weights need all ranks."""
    if times > 0:
        conditioning = collate(pipeline, rows.batch, schedule.pad_to)
        sigma = torch.ones(len(rows), device=rows.final.device)
        for _ in range(times):
            pipeline.velocity(model, rows.final, sigma, conditioning)


class Euler:
    """A row that waits steps from a sigma to the same one, and so stays where it is."""

    def __init__(self, latents: Tensor):
        """latents: (B, ...), where the rows start."""

    def __call__(self, velocity: Tensor, latents: Tensor, now: Tensor, then: Tensor) -> Tensor:
        return sde.step("ode", velocity, latents, now, then, 0.0, sigma_guard=1.0).next_latents

    def forget(self, rows: Tensor) -> None:
        """Start anew in rows that are elsewhere than the step led."""


class Multistep(Euler):
    """DPM-Solver++(2M) (arXiv:2211.01095) as what it adds to an Euler step, row by row.

    With X0 = x - sigma v and h = log((1 - s') / s') - log((1 - s) / s) of a step from s to s', that
    is (1 - s'/s) h / (2 h_before) (X0 - X0 before). 0 in a row's first step, behind a stochastic
    one, in that behind sigma 1, and in the last one.
    """

    def __init__(self, latents: Tensor):
        self._x0 = torch.zeros_like(latents)
        self._h = latents.new_full((len(latents),), torch.inf)

    def __call__(self, velocity: Tensor, latents: Tensor, now: Tensor, then: Tensor) -> Tensor:
        h = torch.logit(now, eps=None) - torch.logit(then, eps=None)  # inf at 1 and at 0
        share = torch.where((then > 0) & (then < now), (1 - then / now) * h / (2 * self._h), 0)
        share = torch.where(self._h.isinf(), 0, share)
        x0 = latents - sde.per_row(now, latents) * velocity
        added = sde.per_row(share, latents) * (x0 - self._x0)
        moves = then < now
        self._x0 = torch.where(sde.per_row(moves.to(x0), x0) > 0, x0, self._x0)
        self._h = torch.where(moves, h, self._h)
        return super().__call__(velocity, latents, now, then) + added

    def forget(self, rows: Tensor) -> None:
        self._h[rows] = torch.inf


def parents(done: list[Denoised], segment: Segment) -> Tensor | None:
    """Gather the states (B, ...) that a segment's rows go on from; None if all start from noise."""
    rows, indices = segment.parent.T
    if (rows < 0).all():
        return None
    ends = np.cumsum([len(part.rollout) for part in done])
    of_size = done[int(np.searchsorted(ends, rows.max(), side="right"))].rollout.final
    start = torch.zeros_like(of_size[:1]).repeat_interleave(len(rows), 0)
    for n in np.flatnonzero(rows >= 0):
        part = int(np.searchsorted(ends, rows[n], side="right"))
        local = rows[n] - (ends[part] - len(done[part].rollout))
        start[n] = done[part].states[int(indices[n])][local]
    return start


def decode(pipeline: PatchedPipeline, rollout: Rollout) -> list[np.ndarray]:
    """Return the images of leaves, uint8 ([F,] H, W, 3) each."""
    return to_uint8(pipeline.decode(rollout.final, rollout.batch.size))


def to_uint8(images: Tensor) -> list[np.ndarray]:
    """Turn (B, [F,] 3, H, W) in [0, 1] into B uint8 ([F,] H, W, 3), rounded as diffusers does."""
    return list((images.movedim(-3, -1) * 255).round().to(torch.uint8).cpu().numpy())


def _initial(
    pipeline: PatchedPipeline, batch: PromptBatch, schedule: Schedule, randomness: Randomness
) -> Tensor:
    owners = [(row.group, 0 if schedule.same_latent else row.member) for row in batch.owners]
    noise = randomness.normal("init", owners, pipeline.noise_shape(batch.size))
    return pipeline.initial_latents(batch.size, _send(noise, pipeline.device))


def _step_noise(
    randomness: Randomness, batch: PromptBatch, segment: Segment, position: int, latents: Tensor
) -> Tensor:
    """Return noise like the latents for the rows that are stochastic here, 0 for others."""
    rows, noise = np.flatnonzero(segment.stochastic[:, position]), torch.zeros_like(latents)
    owners = [batch.owners[n] for n in rows]
    steps = segment.grid[rows, position].tolist()
    names = [(row.group, row.member, i, *row.branch) for row, i in zip(owners, steps, strict=True)]
    fresh = randomness.normal("step", names, latents.shape[1:]).to(latents.dtype)
    noise[_to(latents.device, rows)] = _send(fresh, latents.device)
    return noise


def _save(
    states: dict[int, Tensor], indices: np.ndarray, latents: Tensor, save: Collection[int]
) -> None:
    for index in set(indices.tolist()) & set(save):
        rows = _to(latents.device, np.flatnonzero(indices == index))
        held = states.setdefault(index, torch.zeros_like(latents))
        held[rows] = latents[rows]


def _room(segment: Segment, latents: Tensor, keep: Collection[str]) -> dict[str, Tensor]:
    """Return by a Rollout's fields what is kept of the stochastic steps, (B, K, ...) each."""
    shape = (len(latents), int(segment.stochastic[0].sum()) if keep else 0)
    wide = ["latents", "next_latents", *(name for name in KEPT[2:] if name in keep)]
    room = {name: latents.new_empty(*shape, *latents.shape[1:]) for name in wide}
    steps, after = (_to(latents.device, segment.kept(n)[:, : shape[1]]) for n in (0, 1))
    return room | {"log_probs": latents.new_empty(shape), "steps": steps, "next_steps": after}


def replay(schedule: Schedule, rollout: Rollout, column: int, velocity: Tensor) -> sde.Step:
    """Score the rollout's trained step `column` under another velocity (B, ...) at its state."""
    schedule = schedule.at(rollout.batch.size)
    return sde.step(
        schedule.kind,
        velocity,
        rollout.latents[:, column],
        schedule.sigmas[rollout.steps[:, column]],
        schedule.sigmas[rollout.next_steps[:, column]],
        schedule.noise_level,
        sigma_guard=schedule.sigmas[1],
        next_latents=rollout.next_latents[:, column],
    )


def _to(device: torch.device, array: np.ndarray) -> Tensor:
    return _send(torch.from_numpy(np.ascontiguousarray(array)), device)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it, which pageable memory would."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
