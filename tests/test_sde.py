"""The numbers below come from closed forms in fp64; D is the number of elements of one row."""

import math

import pytest
import torch
from fixtures import (
    F64,
    FIXTURE,
    GUARD,
    NOISE_LEVEL,
    STOCHASTIC,
    V_NEW,
    V,
    X,
    Z,
    clean_grid,
    close,
    randn,
    step,
)

from flow_grpo import sde

DT = 0.1
ODE = torch.tensor([[0.49, -0.98, 0.22, 2.04], [0.95, 0.06, -0.57, 0.83]], dtype=F64)

# One step


@STOCHASTIC
@pytest.mark.parametrize("dtype, atol, rtol", [(F64, 1e-10, 0), (torch.float32, 1e-6, 1e-5)])
def test_the_fixture_has_these_numbers(kind, dtype, atol, rtol):
    truth = FIXTURE[kind]
    x, v, v_new, z = (t.to(dtype) for t in (X, V, V_NEW, Z))
    old = step(kind, v, x, noise=z)
    new = step(kind, v_new, x, next_latents=old.next_latents)
    assert old.std.shape == (2, 1) and old.log_prob.shape == (2,)
    assert {t.dtype for t in (*old, *new)} == {dtype}
    for name in ("std", "mean", "next_latents", "log_prob"):
        close(getattr(old, name), truth[name], atol, rtol)
    close(new.log_prob - old.log_prob, truth["log_ratio"], atol, rtol)
    kl = sde.mean_kl(new.mean, old.mean, old.std)
    close(kl, truth["kl"], atol=0, rtol=1e-9 if dtype == F64 else 2e-4)  # fp32 cancels


def test_the_fixture_s_euler_step_has_these_numbers():
    result = step("ode")
    close(result.next_latents, ODE, atol=1e-12)
    assert torch.equal(result.mean, result.next_latents)
    assert result.std.tolist() == [[0], [0]] and result.log_prob is None
    scored = step("ode", next_latents=X)
    assert torch.equal(scored.next_latents, X) and scored.log_prob is None
    close(scored.mean, ODE, atol=1e-12)


@STOCHASTIC
@pytest.mark.parametrize("sigma, sigma_next", [(1.0, 0.9), (0.8, 0.7), (0.3, 0.05)])
def test_without_noise_every_kernel_is_the_ode_step(kind, sigma, sigma_next):
    ode = step("ode", sigma=sigma, sigma_next=sigma_next)
    result = step(kind, sigma=sigma, sigma_next=sigma_next, level=0.0)
    close(result.next_latents, ode.next_latents, atol=1e-12)
    assert (result.std == 0).all()
    close((1 - sigma_next) * (X - sigma * V) + sigma_next * (X + (1 - sigma) * V), ode.mean, 1e-12)


@STOCHASTIC
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_scoring_the_step_that_was_taken_gives_the_same_bits(kind, dtype):
    x, v, z = (randn(3, 16, 8, 8, seed=seed, dtype=dtype) for seed in range(3))
    taken = step(kind, v, x, noise=z)
    again = step(kind, v, x, next_latents=taken.next_latents)
    assert all(torch.equal(a, b) for a, b in zip(taken, again, strict=True))


@STOCHASTIC
def test_the_gradient_reaches_the_velocity_only_through_the_mean(kind):
    velocity, slope = V.clone().requires_grad_(), FIXTURE[kind]["slope"]
    taken = step(kind, velocity)
    (gradient,) = torch.autograd.grad(taken.mean.sum(), velocity, retain_graph=True)
    close(gradient, slope)
    # d log_prob / dv = slope (next - mean) / (std^2 D), for CPS without its 1 / (2 std^2).
    scale = 2 if kind == "cps" else 1 / FIXTURE[kind]["std"] ** 2
    expected = slope * FIXTURE[kind]["std"] * Z * scale / 4
    (gradient,) = torch.autograd.grad(taken.log_prob.sum(), velocity)
    close(gradient, expected, atol=1e-8)
    given = taken.next_latents.detach().requires_grad_()
    log_prob = step(kind, velocity, next_latents=given).log_prob
    gradient, none = torch.autograd.grad(log_prob.sum(), (velocity, given), allow_unused=True)
    close(gradient, expected, atol=1e-8)
    assert none is None


@pytest.mark.parametrize("a", [0.3, 0.7, 1.2])
def test_flow_sde_responds_to_the_velocity_by_the_same_factor_of_dt_everywhere(a):
    for sigma, sigma_next in ((0.96, 0.91), (0.8, 0.7), (0.3, 0.01)):
        slope = torch.func.grad(
            lambda v, s=sigma, n=sigma_next: step(
                "sde", v, sigma=s, sigma_next=n, level=a
            ).mean.sum()
        )(V)
        close(slope, -(1 + a**2 / 2) * (sigma - sigma_next), atol=1e-12)


def test_the_guard_replaces_sigma_one_in_the_noise_alone():
    result = step("sde", sigma=1.0, sigma_next=0.9, sigma_guard=0.9)
    close(result.std, 0.7, atol=1e-12)
    close(result.mean, (1 - 0.7**2 / 2) * X - V * DT, atol=1e-12)
    close(result.mean[0], [0.3675, -0.735, 0.15875, 1.55], atol=1e-12)
    close(result.mean[1], [0.705, 0.06, -0.4475, 0.64625], atol=1e-12)
    diffusion = result.std / math.sqrt(DT)
    close(diffusion, 2.2135943621)
    result = step("sde", sigma=1.0, sigma_next=0.9, sigma_guard=0.99)
    close(result.std, 2.2135943621)
    close(result.mean, X * (1 - 7.0**2 * DT / 2) - V * DT)


@pytest.mark.parametrize("kind", sde.KERNELS)
def test_the_guard_is_used_at_sigma_one_of_flow_sde_and_nowhere_else(kind):
    for sigma in (0.8, 1.0) if kind != "sde" else (0.8, 0.9999):
        one, other = (step(kind, sigma=sigma, sigma_guard=guard) for guard in (0.5, 0.95))
        assert torch.equal(one.next_latents, other.next_latents)


def test_cps_keeps_the_coefficients_of_signal_and_noise():
    for sigma, sigma_next, eta in ((1.0, 0.9, 0.8), (0.8, 0.7, 0.3), (0.5, 0.1, 1.0)):
        # Where X0 = 0 and X1 = 1 the mean is the coefficient of the old noise, where X0 = 1 and
        # X1 = 0 that of the signal.
        noise, signal = (torch.full_like(X, value) for value in (sigma, 1 - sigma))
        place = dict(sigma=sigma, sigma_next=sigma_next, level=eta)
        old = step("cps", torch.ones_like(X), noise, **place)
        close(old.mean**2 + old.std**2, sigma_next**2, atol=1e-12)
        close(old.std, sigma_next * math.sin(eta * math.pi / 2), atol=1e-12)
        close(step("cps", -torch.ones_like(X), signal, **place).mean, 1 - sigma_next, atol=1e-12)
        total = sde.leftover_noise("cps", sigma, sigma_next, eta, GUARD)
        close(total, sigma_next, atol=1e-12)


def test_cps_at_noise_level_one_keeps_nothing_of_the_old_noise():
    close(step("cps", level=1.0).mean, (1 - 0.7) * (X - 0.8 * V), atol=1e-12)


def test_cps_ends_at_the_clean_prediction_without_a_nan():
    result = step("cps", sigma_next=0.0)
    close(result.next_latents, X - 0.8 * V, atol=1e-12)
    assert result.std.tolist() == [[0], [0]]
    assert result.log_prob.tolist() == [0, 0]


@STOCHASTIC
def test_the_noise_after_one_step_exceeds_sigma_next_by_these_numbers(kind):
    total = sde.leftover_noise(kind, 0.8, 0.7, NOISE_LEVEL[kind], GUARD)
    close(total**2 - 0.7**2, FIXTURE[kind]["excess"], atol=5e-9)
    sigma = torch.tensor(clean_grid(10)[:-1], dtype=F64)
    sigma, sigma_next = sigma[:-1], sigma[1:]
    dt = sigma - sigma_next
    guarded = torch.where(sigma == 1, sigma[1], sigma)
    g2 = {"sde": 0.49 * sigma / (1 - guarded), "dance": 0.09, "cps": 0.0}
    excess = g2[kind] * dt**2 / sigma + g2[kind] ** 2 * dt**2 / (4 * sigma**2)
    total = sde.leftover_noise(kind, sigma, sigma_next, NOISE_LEVEL[kind], sigma[1])
    close(total**2, sigma_next**2 + excess, atol=1e-12)


def test_an_ode_step_leaves_the_noise_the_model_expects():
    assert sde.leftover_noise("ode", 0.8, 0.7, 0.0, GUARD).item() == 0.7


# Rows, shapes, dtypes


@pytest.mark.parametrize("kind", sde.KERNELS)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_a_scalar_a_tensor_and_a_value_per_row_give_the_same_bits(kind, dtype):
    x, v, z = (randn(5, 4, 3, 3, seed=seed).to(dtype) for seed in range(3))
    values = (1.0, 0.9601293103, 0.7, 0.9601293103)  # sigma, sigma_next, noise_level, sigma_guard

    def result(form):
        *given, guard = map(form, values)
        return sde.step(kind, v, x, *given, sigma_guard=guard, noise=z)

    expected = result(float)
    assert expected.mean.dtype == torch.promote_types(dtype, torch.float32)
    assert expected.std.shape == (5, 1, 1, 1)
    for form in (
        lambda value: torch.tensor(value, dtype=F64),
        lambda value: torch.full((5,), value, dtype=F64),
        lambda value: torch.full((1,), value, dtype=F64),
    ):
        for one, other in zip(result(form), expected, strict=True):
            assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("kind", sde.KERNELS)
def test_rows_of_one_batch_may_be_at_different_sigmas(kind):
    x, v, z = (randn(4, 16, 4, 4, seed=seed, dtype=torch.float32) for seed in range(3))
    sigma, sigma_next = torch.tensor([[1, 0.9], [0.8, 0.7], [0.8, 0.2], [0.3, 0.1]]).T
    level, guard = torch.tensor([0.7, 0.3, 0.8, 1.0]), torch.tensor([0.9, 0.5, 0.5, 0.5])
    mixed = sde.step(kind, v, x, sigma, sigma_next, level, sigma_guard=guard, noise=z)
    for row in range(4):
        scalars = (value[row].item() for value in (sigma, sigma_next, level))
        alone = sde.step(kind, v, x, *scalars, sigma_guard=guard[row].item(), noise=z)
        for one, other in zip(mixed, alone, strict=True):
            assert one is other is None or torch.equal(one[row], other[row])


@STOCHASTIC
def test_low_precision_is_left_before_any_arithmetic(kind):
    x, v, z = (t.bfloat16() for t in (X, V, Z))
    low, high = step(kind, v, x, noise=z), step(kind, v.float(), x.float(), noise=z.float())
    assert all(torch.equal(a, b) for a, b in zip(low, high, strict=True))
    mixed = step(kind, v.double(), x, noise=z.double())  # the latents alone choose the precision
    assert all(torch.equal(a, b) for a, b in zip(mixed, high, strict=True))
    scored = step(kind, v, x, next_latents=x)
    assert torch.equal(scored.log_prob, step(kind, v.float(), x, next_latents=x.double()).log_prob)


@pytest.mark.parametrize("kind", sde.KERNELS)
def test_no_value_is_waited_for(kind):
    # A meta tensor has no value: reading one, as .item() and `if` do, raises.
    x = torch.empty(2, 4, 3, 3, device="meta")
    sigma = torch.empty(2, device="meta")
    for given in (sigma, 0.5):
        result = sde.step(kind, x, x, given, given, given, sigma_guard=given, noise=x)
        assert result.next_latents.shape == x.shape


@STOCHASTIC
def test_a_kernel_takes_noise_or_next_latents_and_never_draws(kind):
    for given in ({"noise": None}, {"noise": Z, "next_latents": X}, {"noise": Z[:1]}):
        with pytest.raises(AssertionError):
            step(kind, **given)
    with pytest.raises(AssertionError):
        step("flow", noise=Z)


def test_the_linear_kernels_diffusion_grows_with_sigma():
    for sigma, guard in ((0.8, 0.9), (1.0, 0.9)):
        found = step("linear", level=1.0, sigma=sigma, sigma_guard=guard)
        other = step("dance", level=guard * sigma, sigma=sigma, sigma_guard=guard)
        assert all(torch.equal(one, two) for one, two in zip(found, other, strict=True))
