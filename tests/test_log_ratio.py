"""Log-ratios of a step and divergences between two of them."""

import math

import pytest
import torch
from fixtures import FIXTURE, NOISE_LEVEL, STOCHASTIC, V_NEW, V, Z, close, randn, step

from flow_grpo import sde


@STOCHASTIC
def test_the_log_ratio_is_linear_in_the_noise_minus_the_kl(kind):
    old = step(kind)
    new = step(kind, V_NEW, next_latents=old.next_latents)
    delta = new.mean - old.mean
    std, kl = old.std.flatten(), sde.mean_kl(new.mean, old.mean, old.std)
    expected = (Z * delta).mean(1) / std - kl
    if kind == "cps":
        expected = 2 * std * (Z * delta).mean(1) - delta.square().mean(1)
    close(new.log_prob - old.log_prob, expected, atol=1e-12)


@pytest.mark.parametrize("sigma, sigma_next", [(1.0, 0.9), (0.8, 0.7), (0.3, 0.05)])
def test_the_kl_is_the_table_s_multiple_of_the_velocity_s_square(sigma, sigma_next):
    dt, a, eta = sigma - sigma_next, NOISE_LEVEL["sde"], NOISE_LEVEL["dance"]
    angle = NOISE_LEVEL["cps"] * math.pi / 2
    slope = sigma_next * (1 - sigma) * math.cos(angle) - sigma * (1 - sigma_next)
    factor = {
        "sde": dt * (1 + a**2 / 2) ** 2 * (1 - sigma) / (2 * a**2 * sigma),
        "dance": dt * (1 + eta**2 * (1 - sigma) / (2 * sigma)) ** 2 / (2 * eta**2),
        "cps": slope**2 / (2 * sigma_next**2 * math.sin(angle) ** 2),
    }
    if sigma == 1:
        factor["sde"] = dt**2 / (2 * a**2)
    for kind in NOISE_LEVEL:
        place = dict(sigma=sigma, sigma_next=sigma_next, sigma_guard=sigma_next)
        old, new = step(kind, **place), step(kind, V_NEW, **place)
        kl = sde.mean_kl(new.mean, old.mean, old.std)
        assert kl.shape == (2,)
        close(kl, factor[kind] * (V_NEW - V).square().mean(1), atol=1e-12)


@STOCHASTIC
def test_the_kl_and_its_gradient_vanish_at_the_reference(kind):
    velocity = V.clone().requires_grad_()
    policy, reference = step(kind, velocity), step(kind)
    kl = sde.mean_kl(policy.mean, reference.mean, reference.std)
    kl.sum().backward()
    assert kl.tolist() == [0, 0] and not velocity.grad.any()


@STOCHASTIC
def test_the_expected_log_prob_is_minus_the_entropy(kind):
    num_rows, num_elements = 20_000, 16
    x, v, z = (randn(num_rows, num_elements, seed=seed) for seed in range(3))
    result = step(kind, v, x, noise=z)
    std = FIXTURE[kind]["std"]
    expected = -1 / 2 - math.log(std) - math.log(2 * math.pi) / 2
    error = math.sqrt(1 / 2 / (num_rows * num_elements))  # of a mean of z^2 / 2
    if kind == "cps":
        expected, error = -(std**2), 2 * std**2 * error
    close(result.log_prob.mean(), expected, atol=3 * error)


@STOCHASTIC
def test_over_the_noise_the_log_ratio_has_this_mean_and_spread(kind):
    num_rows, num_elements = 50_000, 64
    z, delta = randn(num_rows, num_elements), randn(1, num_elements, seed=1)
    x = torch.zeros_like(z)
    old = step(kind, x, x, noise=z)
    new = step(kind, x + 0.1 * delta, x, next_latents=old.next_latents)
    log_ratio, kl = new.log_prob - old.log_prob, sde.mean_kl(new.mean, old.mean, old.std)
    if kind == "cps":  # its log-density lacks 1 / (2 std^2)
        log_ratio = log_ratio / (2 * old.std.flatten() ** 2)
    spread = (2 * kl[0] / num_elements).sqrt().item()
    close(log_ratio.mean(), -kl[0], atol=3 * spread / math.sqrt(num_rows))
    close(log_ratio.std(), spread, atol=3 * spread / math.sqrt(2 * num_rows))
    # GRPO-Guard's exponent: no bias, and a spread that forgets the step's std.
    exponent = (log_ratio + kl) * old.std.flatten()
    norm = (new.mean - old.mean)[0].norm().item() / num_elements
    close(exponent.mean(), 0.0, atol=3 * norm / math.sqrt(num_rows))
    close(exponent.std(), norm, atol=3 * norm / math.sqrt(2 * num_rows))
