"""The solver of order 2 for steps that are not stochastic, against diffusers' and a closed form."""

import math

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from fixtures import F64, blank_batch, clean_grid
from test_segments import walk
from toy import VARIANCE, Toy

from flow_grpo import rollouts
from flow_grpo.randomness import Randomness
from flow_grpo.rollouts import Segment
from flow_grpo.sampling import Schedule, denoise


def drawn(num_steps, solver="dpm2", segment=None, kind="ode", num_rows=3, first=1.0):
    """Return the toy's final states from fp64 noise, the noise, and the pipeline."""
    sigmas = torch.tensor([first, *clean_grid(num_steps)[1:]], dtype=F64)
    pipeline = Toy(sigmas)
    initial = pipeline.initial_latents
    pipeline.initial_latents = lambda size, noise: initial(size, noise.double())
    rows = torch.arange(num_rows)
    segment = segment or rollouts.whole(np.zeros((num_rows, 0)), num_steps)
    schedule = Schedule(sigmas, kind, 0.7, solver=solver)
    randomness = Randomness(1, (0,))
    batch = blank_batch(rows, torch.zeros_like(rows))
    done = denoise(pipeline, pipeline.transformer, batch, schedule, randomness, segment)
    noise = randomness.normal("init", [(n, 0) for n in range(num_rows)], (4,)).double()
    return done.rollout.final, noise, pipeline


@pytest.mark.parametrize("num_steps", [2, 5, 10])
def test_it_draws_what_diffusers_solver_draws(num_steps):
    final, latents, pipeline = drawn(num_steps, first=0.999)  # it can't start from 1
    stock = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        final_sigmas_type="zero",
        lower_order_final=True,
    )
    stock.set_timesteps(num_steps)
    stock.sigmas = pipeline.transformer.sigmas.clone()
    for i, time in enumerate(stock.timesteps):
        sigma = pipeline.transformer.sigmas[i].expand(len(latents))
        velocity = pipeline.transformer(latents, sigma)
        latents = stock.step(velocity, time, latents).prev_sample.double()
    torch.testing.assert_close(final, latents, rtol=0, atol=5e-7)  # its arithmetic is fp32


def exact(noise):
    """The end of the Gaussian's path, which keeps each element's quantile."""
    return noise * math.sqrt(VARIANCE)


def test_it_is_better_than_euler_with_twice_the_steps():
    errors = {}
    for solver, counts in {"euler": (40, 80), "dpm2": (20, 40)}.items():
        for num_steps in counts:
            final, noise, _ = drawn(num_steps, solver)
            errors[solver, num_steps] = (final - exact(noise)).abs().max().item()
    assert 1.8 < errors["euler", 40] / errors["euler", 80] < 2.2
    for num_steps in (20, 40):
        assert errors["dpm2", num_steps] < errors["euler", 2 * num_steps]


def test_a_row_that_waits_walks_as_one_that_does_not():
    alone, _, _ = drawn(6)
    grid = np.array(
        [[0, 0, 0, 1, 2, 3, 4, 5, 6], [0, 1, 1, 1, 2, 3, 4, 5, 6], [0, 1, 2, 2, 3, 3, 4, 5, 6]]
    )
    segment = Segment(grid, np.zeros((3, 8), dtype=bool), np.full((3, 2), -1))
    waiting, _, _ = drawn(6, segment=segment)
    torch.testing.assert_close(waiting, alone, rtol=0, atol=1e-12)


def test_behind_a_stochastic_step_it_begins_anew():
    steps = np.tile([[2]], (3, 1))
    whole = rollouts.whole(steps, 6)
    final, _, pipeline = drawn(6, segment=whole, kind="sde")
    again = drawn(6, segment=whole, kind="sde", solver="euler")[0]
    assert not torch.equal(final, again)
    # From behind that step on, a path is that of a row which starts there.
    sigmas = pipeline.transformer.sigmas
    schedule = Schedule(sigmas, "sde", 0.7, solver="dpm2")
    batch = blank_batch(torch.arange(3), torch.zeros(3, dtype=torch.int64))
    randomness, model = Randomness(1, (0,)), pipeline.transformer
    kept = denoise(pipeline, model, batch, schedule, randomness, whole, keep=("states",))
    tail = Segment(
        np.tile(np.arange(3, 7), (3, 1)), np.zeros((3, 3), dtype=bool), np.array([[0, 3]] * 3)
    )
    start = kept.rollout.next_latents[:, 0]
    ended = denoise(pipeline, model, batch, schedule, randomness, tail, start=start)
    assert torch.equal(ended.rollout.final, kept.rollout.final)
    assert torch.equal(kept.rollout.final, final)


def test_euler_is_as_it_was():
    calls = rollouts.independent([[(0, 0), (1, 0)]], lambda groups: np.array([[1]] * 2), 6)
    before, _ = walk(calls)
    assert torch.isfinite(before.final).all()
    assert Schedule(torch.ones(2)).solver == "euler"
