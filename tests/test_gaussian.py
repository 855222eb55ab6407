"""A Gaussian whose velocity is known: x0 ~ N(M, V0), so every state is Gaussian."""

import math

import pytest
import torch
from fixtures import F64, clean_grid, close, step

M, V0 = 0.5, 0.25
EXACT = [1, 0.93016582, 0.85355030, 0.76953125, 0.67768595, 0.57812500]
EXACT += [0.47222222, 0.36425781, 0.26530612, 0.20312500, 0.25]
VARIANCES = {
    "ode": [1, 0.92984694, 0.85280143, 0.76817970, 0.67544876, 0.57450720]
    + [0.46628293, 0.35400419, 0.24587391, 0.16039999, 0.13667218],
    "sde": [1, 1.00737194, 0.99015938, 0.89051157, 0.78070318, 0.66424861]
    + [0.54227416, 0.41797328, 0.29959792, 0.20579960, 0.17535587],
    "dance": [1, 0.92996432, 0.85307052, 0.76865016, 0.67619498, 0.57564528]
    + [0.46800307, 0.35663557, 0.25001752, 0.16717120, 0.14244174],
    "cps": [1, 0.92984694, 0.85242179, 0.76681254, 0.67216943, 0.56790961]
    + [0.45424421, 0.33346619, 0.21330190, 0.11614152, 0.09896082],
}
FINAL = {  # by number of steps
    20: dict(ode=0.186241, sde=0.210145, dance=0.191310, cps=0.122420),
    40: dict(ode=0.215962, sde=0.229690, dance=0.219165, cps=0.137695),
    100: dict(ode=0.235806, sde=0.242357, dance=0.237268, cps=0.149665),
    1000: dict(ode=0.248543, sde=0.249729, dance=0.248701, cps=0.160696),
}


def gaussian_velocity(x, sigma):
    variance = (1 - sigma) ** 2 * V0 + sigma**2
    return -M + (sigma - (1 - sigma) * V0) / variance * (x - (1 - sigma) * M)


def variances(kind, num_steps, stochastic):
    """Follow the exact variance: a step is affine, x' = slope x + offset + std z."""
    sigmas, variance, history = clean_grid(num_steps), 1.0, [1.0]
    for i, sigma in enumerate(sigmas[:-1]):
        x = torch.tensor([[0.0], [1.0]], dtype=F64)
        chosen = kind if i in stochastic else "ode"
        place = dict(sigma=sigma, sigma_next=sigmas[i + 1], sigma_guard=sigmas[1])
        result = step(chosen, gaussian_velocity(x, sigma), x, noise=torch.zeros_like(x), **place)
        slope, std = (result.mean[1] - result.mean[0]).item(), result.std[0].item()
        variance = slope**2 * variance + std**2
        history.append(variance)
    return torch.tensor(history, dtype=F64)


def test_the_gaussian_velocity_is_the_one_of_the_table():
    assert gaussian_velocity(1.0, 0.75) == pytest.approx(0.5405405405, abs=1e-10)
    exact = [(1 - sigma) ** 2 * V0 + sigma**2 for sigma in clean_grid(10)]
    close(torch.tensor(exact, dtype=F64), EXACT, atol=6e-9)


@pytest.mark.parametrize("kind", VARIANCES)
def test_the_variance_along_ten_steps_is_this(kind):
    close(variances(kind, 10, range(9)), VARIANCES[kind], atol=6e-9)


@pytest.mark.parametrize("num_steps", FINAL)
def test_only_cps_misses_the_data_s_variance_as_the_grid_is_refined(num_steps):
    for kind, expected in FINAL[num_steps].items():
        final = variances(kind, num_steps, range(num_steps - 1))[-1]
        close(final, expected, atol=6e-7)
        if num_steps == 1000:
            limit = V0 * (1 + math.cos(0.4 * math.pi)) / 2 if kind == "cps" else V0
            close(final, limit, atol=0.003 if kind == "cps" else 0.002)


@pytest.mark.parametrize(
    "kind, stochastic, expected",
    [
        ("sde", range(1, 3), 0.15469714),
        ("dance", range(1, 3), 0.13673879),
        ("cps", range(1, 3), 0.13642894),
        ("sde", range(10), 0.18007975),
    ],
)
def test_the_final_variance_depends_on_which_steps_are_stochastic(kind, stochastic, expected):
    close(variances(kind, 10, stochastic)[-1], expected, atol=6e-9)


@pytest.mark.parametrize("kind", VARIANCES)
def test_samples_have_the_gaussian_s_moments_at_every_step(kind):
    num_samples, sigmas = 200_000, clean_grid(10)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_samples, 1, generator=generator, dtype=F64)
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        noise = torch.randn(x.shape, generator=generator, dtype=F64)
        place = dict(sigma=sigma, sigma_next=sigma_next, sigma_guard=sigmas[1], noise=noise)
        x = step(kind if i < 9 else "ode", gaussian_velocity(x, sigma), x, **place).next_latents
        variance = VARIANCES[kind][i + 1]
        close(x.mean(), (1 - sigma_next) * M, atol=3 * math.sqrt(variance / num_samples))
        close(x.var(), variance, atol=3 * variance * math.sqrt(2 / num_samples))
