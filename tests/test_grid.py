"""Whole grids of noise levels, and the step's scale at each of them."""

import math

import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from fixtures import F64, SD3_SIGMAS, V, X, clean_grid, close, randn, shifted, step

from flow_grpo import sde
from flow_grpo.records import Size


def scheduler_of(num_steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3)
    scheduler.set_timesteps(num_steps)
    return scheduler


@pytest.mark.parametrize("num_steps", [4, 10, 28, 40])
def test_the_sd3_grid_is_shifted_twice(num_steps):
    sigmas = scheduler_of(num_steps).sigmas.double()
    u = torch.linspace(1, shifted(0.001), num_steps, dtype=F64)
    close(sigmas, [*shifted(u), 0], atol=1e-7)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


def test_the_grids_have_these_numbers():
    close(scheduler_of(10).sigmas, SD3_SIGMAS, atol=1e-7)
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


@pytest.mark.parametrize("name", ["sd3", "wan", "flux", "qwenimage", "zimage"])
def test_a_clean_grid_is_shifted_once_from_even_places(name):
    model = tiny.patched(name)
    stock = model.sigmas(20, Size(64, 64))
    model.clean_grid = True
    clean = model.sigmas(20, Size(64, 64))
    assert clean[0] == 1 and clean[-1] == 0 and (clean.diff() < 0).all()
    if name in ("flux", "qwenimage"):  # theirs is clean
        assert torch.equal(clean, stock)
    else:
        shift = model.pipe.scheduler.config.shift
        even = 1 - torch.arange(21, dtype=torch.float64) / 20
        expected = shift * even / (1 + (shift - 1) * even)
        torch.testing.assert_close(clean.double(), expected, rtol=0, atol=1e-6)


def test_wans_clean_grid_is_unipcs_to_4e_3():
    unipc = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    unipc.set_timesteps(20)
    model = tiny.patched("wan")
    model.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    model.clean_grid = True
    clean = model.sigmas(20, Size(64, 64))
    assert (clean - unipc.sigmas).abs().max() < 4e-3 + 1e-4
