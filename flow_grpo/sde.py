"""One denoising step of a flow-matching model, and the log-probability of where it went.

A state is x = (1 - sigma) x0 + sigma x1, x0 clean, x1 Gaussian, velocity = x1 - x0. A velocity
predicts both ends: X0 = x - sigma * velocity, X1 = x + (1 - sigma) * velocity. All kernels are
next = (1 - sigma_next) X0 + kept_noise * X1 + std * noise.
"""

from collections.abc import Callable
from math import inf, log, pi, prod
from typing import NamedTuple

import torch
from torch import Tensor

Split = tuple[Tensor, Tensor]  # what X1 keeps in the mean, the noise's std


class Step(NamedTuple):
    next_latents: Tensor  # (B, ...) fp32, fp64 if the latents were
    mean: Tensor  # (B, ...) the only way back for a gradient
    std: Tensor  # (B, 1, ...)
    log_prob: Tensor | None  # (B,) mean over a row's elements; None for "ode"


def step(
    kind: str,
    velocity: Tensor,
    latents: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    noise_level: float | Tensor,
    *,
    sigma_guard: float | Tensor,
    next_latents: Tensor | None = None,
    noise: Tensor | None = None,
) -> Step:
    """Step from sigma to sigma_next, or score the step that was taken.

    velocity, latents: (B, ...). sigma > sigma_next, noise_level, sigma_guard: scalars or (B,).
    noise_level: a of "sde", eta of "dance" and "cps", up to the kernel's max_level; "linear" has
    1. sigma_guard: replaces sigma = 1, where Flow-SDE's noise is infinite; the grid's second value.
    next_latents: (B, ...) where the step went, a constant to the gradient; else noise: (B, ...)
    standard normal. A stochastic kind takes exactly one of the two and draws nothing itself.
    log_prob is the Gaussian's log-density divided by the number of elements, so that a ratio of two
    is the D-th root of the true one; without has_variance it is -mean((next - mean)^2) alone.
    Where a kernel that has it gives a std of 0 it is not finite: call "ode" there.
    """
    assert kind in KERNELS, kind
    kernel = KERNELS[kind]
    assert velocity.shape == latents.shape, (velocity.shape, latents.shape)
    dtype = torch.promote_types(latents.dtype, torch.float32)
    latents, velocity = latents.to(dtype), velocity.to(dtype)
    sigma, sigma_next, noise_level, sigma_guard = (
        per_row(value, latents) for value in (sigma, sigma_next, noise_level, sigma_guard)
    )
    kept_noise, std = kernel.split(sigma, sigma_next, noise_level, sigma_guard)
    if kind == "ode":
        mean = latents + (sigma_next - sigma) * velocity
        return Step(mean if next_latents is None else next_latents.to(dtype), mean, std, None)

    x0, x1 = latents - sigma * velocity, latents + (1 - sigma) * velocity
    mean = (1 - sigma_next) * x0 + kept_noise * x1
    assert (next_latents is None) != (noise is None), "give next_latents or noise, not both"
    if next_latents is None:
        assert noise.shape == latents.shape, (noise.shape, latents.shape)
        next_latents = mean + std * noise.to(dtype)
    next_latents = next_latents.to(dtype)
    assert next_latents.shape == latents.shape, (next_latents.shape, latents.shape)
    log_prob = -_row_mean((next_latents.detach() - mean) ** 2)
    if kernel.has_variance:
        row_std = std.flatten()
        log_prob = log_prob / (2 * row_std**2) - torch.log(row_std) - log(2 * pi) / 2
    return Step(next_latents, mean, std, log_prob)


def mean_kl(mean: Tensor, other_mean: Tensor, std: Tensor) -> Tensor:
    """Measure the KL divergence (B,) of steps (B, ...) of equal std (B, 1, ...), per element."""
    return _row_mean((mean - other_mean) ** 2 / (2 * std**2))


def of_a_nat(kind: str, step: Step) -> float | Tensor:
    """Return what a step's log_prob changes by for a nat of the row's log-density.

    1 / D of its D elements; without has_variance 2 std^2 / D, (B,).
    """
    share = 1 / prod(step.mean.shape[1:])
    return share if KERNELS[kind].has_variance else share * 2 * step.std.flatten() ** 2


def leftover_noise(kind: str, *values: float | Tensor) -> Tensor:
    """Give the noise's total coefficient after one step, fp64; the model expects sigma_next.

    values: sigma, sigma_next, noise_level and sigma_guard, which broadcast.
    Old and fresh noise add up as variances (arXiv:2509.05952, Figure 2): Flow-SDE and Dance-SDE
    leave too much, by g^2 dt^2 / sigma + g^4 dt^2 / (4 sigma^2).
    """
    exact = (torch.as_tensor(value, dtype=torch.float64, device="cpu") for value in values)
    return torch.hypot(*KERNELS[kind].split(*exact))


def _flow_sde(sigma: Tensor, sigma_next: Tensor, noise_level: Tensor, guard: Tensor) -> Split:
    guarded = torch.where(sigma == 1, guard, sigma)
    return _diffuse(sigma, sigma_next, noise_level * torch.sqrt(sigma / (1 - guarded)))


def _dance_sde(sigma: Tensor, sigma_next: Tensor, noise_level: Tensor, guard: Tensor) -> Split:
    return _diffuse(sigma, sigma_next, noise_level)


def _linear_sde(sigma: Tensor, sigma_next: Tensor, noise_level: Tensor, guard: Tensor) -> Split:
    return _diffuse(sigma, sigma_next, noise_level * guard * sigma)


def _cps(sigma: Tensor, sigma_next: Tensor, noise_level: Tensor, guard: Tensor) -> Split:
    angle = noise_level * (pi / 2)
    return sigma_next * torch.cos(angle), sigma_next * torch.sin(angle)


def _euler(sigma: Tensor, sigma_next: Tensor, noise_level: Tensor, guard: Tensor) -> Split:
    return sigma_next, torch.zeros_like(sigma_next)


def _diffuse(sigma: Tensor, sigma_next: Tensor, diffusion: Tensor) -> Split:
    """Split as an SDE of this diffusion coefficient does that keeps the marginals."""
    dt = sigma - sigma_next
    return sigma_next - diffusion**2 * dt / (2 * sigma), diffusion * torch.sqrt(dt)


class Kernel(NamedTuple):
    """One way to step: what distinguishes it from the others."""

    split: Callable[[Tensor, Tensor, Tensor, Tensor], Split]  # sigma, sigma_next, level, guard
    default_level: float  # of noise
    max_level: float
    has_variance: bool  # log_prob is divided by the variance, which grows with sigma - sigma_next


KERNELS = {
    "sde": Kernel(_flow_sde, 0.7, inf, True),  # Flow-SDE, arXiv:2505.05470
    "cps": Kernel(_cps, 0.8, 1.0, False),  # coefficients preserved, arXiv:2509.05952
    "dance": Kernel(_dance_sde, 0.3, inf, True),  # Dance-SDE, arXiv:2505.07818
    "linear": Kernel(_linear_sde, 1.0, inf, True),  # of Flow-GRPO's video runs
    "ode": Kernel(_euler, 0.0, 0.0, False),  # diffusers' FlowMatchEulerDiscreteScheduler
}
STOCHASTIC = tuple(kind for kind in KERNELS if kind != "ode")


def per_row(value: float | Tensor, latents: Tensor) -> Tensor:
    """Shape a scalar or (B,) as (B, 1, ...) in the latents' dtype; never waits for the device."""
    shape = (len(latents),) + (1,) * (latents.ndim - 1)
    if not isinstance(value, Tensor):
        return latents.new_full(shape, value)
    return value.to(latents).expand(len(latents)).reshape(shape)


def _row_mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)
