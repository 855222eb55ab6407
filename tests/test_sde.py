"""The numbers below come from closed forms in fp64; D is the number of elements of one row."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from flow_grpo import sde

F64 = torch.float64
NOISE_LEVEL = {"sde": 0.7, "dance": 0.3, "cps": 0.8}
STOCHASTIC = pytest.mark.parametrize("kind", list(NOISE_LEVEL))
DT, GUARD = 0.1, 0.9
X = torch.tensor([[0.5, -1, 0.25, 2], [1, 0, -0.5, 0.75]], dtype=F64)
V = torch.tensor([[0.1, -0.2, 0.3, -0.4], [0.5, -0.6, 0.7, -0.8]], dtype=F64)
Z = torch.tensor([[1, -1, 0.5, -0.5], [0.25, -0.75, 1.5, -2]], dtype=F64)
V_NEW = V + 0.01 * torch.tensor([[1, 2, -1, 0.5], [-2, 1, 0.5, 1]], dtype=F64)
ODE = torch.tensor([[0.49, -0.98, 0.22, 2.04], [0.95, 0.06, -0.57, 0.83]], dtype=F64)

FIXTURE = {
    "sde": dict(
        std=0.4427188724,
        mean=[[0.4263, -0.8526, 0.182025, 1.8048], [0.81525, 0.0747, -0.5259, 0.757725]],
        next_latents=[
            [0.8690188724, -1.2953188724, 0.4033844362, 1.5834405638],
            [0.9259297181, -0.2573391543, 0.1381783086, -0.1277127448],
        ],
        log_prob=[-0.4166182233, -0.9634932233],
        log_ratio=[0.0012241453, 0.0017514269],
        kl=6.1783522003e-06,
        slope=-0.1245,
        excess=0.03950625,
    ),
    "dance": dict(
        std=0.0948683298,
        mean=[
            [0.487075, -0.97415, 0.21825625, 2.0292],
            [0.9438125, 0.060675, -0.567975, 0.82668125],
        ],
        next_latents=[
            [0.5819433298, -1.0690183298, 0.2656904149, 1.9817658351],
            [0.9675295825, -0.0104762474, -0.4256725053, 0.6369445904],
        ],
        log_prob=[1.1238268176, 0.5769518176],
        log_ratio=[0.0045747664, 0.0065734247],
        kl=8.8769666884e-05,
        slope=-0.101125,
        excess=0.00115664,
    ),
    "cps": dict(
        std=0.6657395614,
        mean=[
            [0.2384821860, -0.4769643719, 0.0700566878, 1.1113188404],
            [0.4179430857, 0.1180425725, -0.3958722826, 0.5446240187],
        ],
        next_latents=[
            [0.9042217474, -1.1427039333, 0.4029264685, 0.7784490597],
            [0.5843779760, -0.3812620986, 0.6027370595, -0.7868551041],
        ],
        log_prob=[-0.2770057273, -0.7617657500],
        log_ratio=[0.0011399924, 0.0016311525],
        kl=6.8226977044e-06,
        slope=-0.1967376208,
        excess=0,
    ),
}


def step(kind, velocity=V, latents=X, sigma=0.8, sigma_next=0.7, level=None, **given):
    level = NOISE_LEVEL.get(kind, 0.0) if level is None else level
    given.setdefault("sigma_guard", GUARD)
    if not {"noise", "next_latents"} & set(given):
        given["noise"] = Z
    return sde.step(kind, velocity, latents, sigma, sigma_next, level, **given)


def close(actual, expected, atol=1e-9, rtol=0.0):
    expected = torch.as_tensor(expected, dtype=actual.dtype).broadcast_to(actual.shape)
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def shifted(u, shift=3):
    return shift * u / (1 + (shift - 1) * u)


def clean_grid(num_steps):
    return shifted(1 - torch.arange(num_steps + 1, dtype=F64) / num_steps).tolist()


def scheduler_of(num_steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3)
    scheduler.set_timesteps(num_steps)
    return scheduler


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


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


@pytest.mark.parametrize("kind", sde.KINDS)
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


@pytest.mark.parametrize("kind", sde.KINDS)
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


@pytest.mark.parametrize("kind", sde.KINDS)
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


@pytest.mark.parametrize("kind", sde.KINDS)
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


# Whole grids


@pytest.mark.parametrize("num_steps", [4, 10, 28, 40])
def test_the_sd3_grid_is_shifted_twice(num_steps):
    sigmas = scheduler_of(num_steps).sigmas.double()
    u = torch.linspace(1, shifted(0.001), num_steps, dtype=F64)
    close(sigmas, [*shifted(u), 0], atol=1e-7)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


def test_the_grids_have_these_numbers():
    expected = [1, 0.9601293103, 0.9133489461, 0.8576923077, 0.7903682720, 0.7072784810]
    expected += [0.6021505376, 0.4648760331, 0.2780487805, 0.0089285714, 0]
    close(scheduler_of(10).sigmas, expected, atol=1e-7)
    close(scheduler_of(4).sigmas, [1, 0.8576923077, 0.6021505376, 0.0089285714, 0], atol=1e-7)
    expected = [1, 0.9642857143, 0.9230769231, 0.875, 0.8181818182, 0.75]
    expected += [0.6666666667, 0.5625, 0.4285714286, 0.25, 0]
    close(torch.tensor(clean_grid(10), dtype=F64), expected, atol=1e-10)
    exponential = [math.exp(math.log(3)) / (math.exp(math.log(3)) + 1 / u - 1) for u in (0.5, 0.9)]
    close(torch.tensor(exponential, dtype=F64), [0.75, shifted(0.9)], atol=1e-12)


@pytest.mark.parametrize("num_steps", [10, 28])
@pytest.mark.parametrize("per_row", [False, True])
def test_the_ode_is_diffusers_euler_bit_for_bit(num_steps, per_row):
    scheduler = scheduler_of(num_steps)
    sigmas = scheduler.sigmas.expand(3, -1).T if per_row else scheduler.sigmas
    ours = theirs = randn(3, 16, 8, 8, dtype=torch.float32)
    for i, t in enumerate(scheduler.timesteps):
        velocity = torch.sin(3 * theirs) + 0.1 * i
        ours = sde.step("ode", velocity, ours, sigmas[i], sigmas[i + 1], 0.7, sigma_guard=0.9)
        ours = ours.next_latents
        theirs = scheduler.step(velocity, t, theirs, return_dict=False)[0]
        assert torch.equal(ours, theirs)


def test_every_step_of_the_sd3_grid_has_this_scale():
    # (step, std, |dmean/dv| / std, KL per mean square of dv; the same of CPS: std, ratio)
    table = [
        (0, 0.700000, 0.0570, 0.00162, 0.91314, 0.0437),
        (1, 0.742964, 0.0784, 0.00307, 0.86865, 0.0828),
        (2, 0.536152, 0.1292, 0.00835, 0.81571, 0.1312),
        (4, 0.391794, 0.2640, 0.03486, 0.67266, 0.2758),
        (6, 0.319070, 0.5356, 0.14346, 0.44212, 0.5995),
        (8, 0.225360, 1.4868, 1.10521, 0.00849, 32.217),
        (9, 0.006278, 1.7706, 1.56754, 0.0, math.inf),
    ]
    sigmas = [*shifted(torch.linspace(1, shifted(0.001), 10, dtype=F64)).tolist(), 0.0]
    for i, std, ratio, kl, cps_std, cps_ratio in table:
        place = dict(sigma=sigmas[i], sigma_next=sigmas[i + 1], sigma_guard=sigmas[1])
        for kind, expected_std, expected in (("sde", std, ratio), ("cps", cps_std, cps_ratio)):
            zero, one = (step(kind, v, 0 * X, **place) for v in (0 * V, torch.ones_like(V)))
            close(one.std, expected_std, atol=6e-6)
            close((one.mean - zero.mean).abs() / one.std, expected, atol=0, rtol=2e-3)
            if kind == "sde":
                close(sde.mean_kl(one.mean, zero.mean, one.std), kl, atol=6e-6)


# Log-ratios and divergences


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


# A Gaussian whose velocity is known: x0 ~ N(M, V0), so every state is Gaussian

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


@pytest.mark.parametrize("kind", sde.KINDS)
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


@pytest.mark.parametrize("kind", sde.KINDS)
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
