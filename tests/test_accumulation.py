"""One update of the toy, in fp64: whole, accumulated, weighted, skipped."""

import math
from functools import partial

import pytest
import torch
from toy import GRID, VARIANCE, make_run, plan_of, roll_out, take_step, weigh

from flow_grpo.objectives.base import Objective
from flow_grpo.objectives.ratio.grpo import GRPO
from flow_grpo.records import Loss, Point

close = partial(torch.testing.assert_close, atol=1e-12, rtol=0)  # of one shape and dtype, too


def exact_run(folder, objective_class=GRPO, **keys):
    """A run in fp64 that subtracts the gradient from its weights, and a rollout of it."""
    keys = {"sample__sde_window_size": 2, "train__max_grad_norm": 0.0, **keys}
    plan = plan_of(num_groups=4, group_size=6)
    sampled = make_run(folder, plan, torch.optim.SGD, **keys)
    rollout = roll_out(sampled)
    weigh(sampled, rollout)
    for name in ("latents", "next_latents", "log_probs", "final", "advantages", "weights"):
        setattr(rollout, name, getattr(rollout, name).double())
    keys["train__learning_rate"] = 1.0
    sigmas = GRID.double()
    return make_run(folder, plan, torch.optim.SGD, sigmas, objective_class, **keys), rollout


def step_taken(run, micros):
    """Make one optimizer step on these micro-batches and return how it changed the weights."""
    before = run.model.shift.detach().clone()
    take_step(run, micros)
    return run.model.shift.detach() - before


def cut(rollout, num_parts):
    size = len(rollout) // num_parts
    return [rollout.rows(slice(i * size, (i + 1) * size)) for i in range(num_parts)]


def expected_gradient(rollout, noise_level=0.7):
    """Of minus the advantage times the log-prob, averaged over rows and trained steps."""
    gradient = torch.zeros(10, dtype=torch.float64)
    sigmas = GRID.double()
    for row, steps in enumerate(rollout.steps.tolist()):
        for column, i in enumerate(steps):
            sigma, dt = sigmas[i], sigmas[i] - sigmas[i + 1]
            diffusion2 = noise_level**2 * sigma / (1 - (sigmas[1] if i == 0 else sigma))
            x, after = rollout.latents[row, column], rollout.next_latents[row, column]
            spread = (1 - sigma) ** 2 * VARIANCE + sigma**2
            velocity = (sigma - (1 - sigma) * VARIANCE) / spread * x
            slope = -dt * (1 + diffusion2 * (1 - sigma) / (2 * sigma))
            mean = x * (1 - diffusion2 * dt / (2 * sigma)) + slope * velocity
            log_prob = ((after - mean) * slope / (diffusion2 * dt)).mean()
            gradient[i] -= rollout.advantages[row] * log_prob / rollout.steps.numel()
    return gradient


def test_one_update_is_the_mean_gradient_of_all_rows_and_steps(tmp_path):
    run, rollout = exact_run(tmp_path)
    change = step_taken(run, [rollout])
    assert len(change.nonzero()) > 2  # windows start at several steps
    close(change, -expected_gradient(rollout), atol=1e-6)  # its log-probs are of fp32


@pytest.mark.parametrize("num_parts", [2, 4, 24])
def test_accumulated_micro_batches_make_the_update_of_one_big_batch(tmp_path, num_parts):
    run, rollout = exact_run(tmp_path, train__step_weight="std", train__clip_range=0.01)
    run.model.shift.data += 0.02  # off policy
    whole = step_taken(run, [rollout])
    again, rollout = exact_run(tmp_path, train__step_weight="std", train__clip_range=0.01)
    again.model.shift.data += 0.02
    close(step_taken(again, cut(rollout, num_parts)), whole)


def test_training_the_same_steps_twice_leaves_the_update_unchanged(tmp_path):
    run, rollout = exact_run(tmp_path)
    once = step_taken(run, [rollout])
    again, rollout = exact_run(tmp_path)
    columns = [0, 0, 1, 1]
    for name in ("steps", "next_steps", "latents", "next_latents", "log_probs"):
        setattr(rollout, name, getattr(rollout, name)[:, columns])
    close(step_taken(again, cut(rollout, 3)), once)


class Tilt(Objective):
    """A loss whose gradient in the first step's weight is the row's advantage."""

    def points(self, rows, randomness):
        sigma = self.schedule.sigmas[:1].expand(len(rows))
        step = torch.zeros(len(rows), dtype=torch.int64)
        return [Point(rows.final, sigma, step=step)]

    def loss(self, velocity, known, rows, point):
        return Loss(rows.advantages * velocity.mean(1), {})


@pytest.mark.parametrize(
    "sizes, weights, mean",
    [
        ((3, 1), (1, 1, 1, 1), 4),  # the mean of both means would be 6
        ((2, 2), (1, 1, 1, 1), 4),
        ((2, 2), (1, 1, 0, 1), 13 / 3),
        ((1, 3), (0, 2, 1, 1), 17 / 4),
        ((2, 2), (0, 0, 0, 0), 0),
    ],
)
def test_the_update_is_the_weighted_mean_of_unequal_micro_batches(tmp_path, sizes, weights, mean):
    run, rollout = exact_run(tmp_path, objective_class=Tilt)
    rollout = rollout.rows(slice(0, 4))
    rollout.advantages = torch.tensor([1.0, 2, 3, 10], dtype=torch.float64)
    rollout.weights = torch.tensor(weights, dtype=torch.float64)
    micros = [rollout.rows(slice(0, sizes[0])), rollout.rows(slice(sizes[0], 4))]
    expected = torch.zeros(10, dtype=torch.float64)
    expected[0] = -mean
    close(step_taken(run, micros), expected)


def test_an_update_forgets_the_gradient_of_the_one_before(tmp_path):
    run, rollout = exact_run(tmp_path, objective_class=Tilt)
    close(step_taken(run, [rollout]), step_taken(run, [rollout]), atol=1e-15)


def test_a_kl_pulls_towards_a_reference_that_stays(tmp_path):
    run, rollout = exact_run(tmp_path, train__beta=0.3, train__kl_mode="v")
    rollout.advantages = torch.zeros(24, dtype=torch.float64)
    start = torch.linspace(-0.1, 0.1, 10, dtype=torch.float64)
    run.model.shift.data += start  # the reference's is 0
    often = torch.bincount(rollout.steps.flatten(), minlength=10) / rollout.steps.numel()
    close(step_taken(run, cut(rollout, 2)), -0.3 * 2 * start * often.double(), atol=1e-7)
    with run.snapshots.using("reference"):
        assert (run.model.shift == 0).all()


def test_a_non_finite_loss_leaves_no_trace_in_the_next_update(tmp_path):
    run, rollout = exact_run(tmp_path)
    good, bad = cut(rollout, 2), cut(rollout, 2)
    bad[1].advantages = torch.full((12,), math.nan, dtype=torch.float64)
    assert (step_taken(run, bad) == 0).all() and run.updater.num_skipped == 1
    change = step_taken(run, good)
    again, _ = exact_run(tmp_path)
    assert torch.equal(change, step_taken(again, good)) and run.updater.num_updates == 1


def test_the_average_follows_every_second_update(tmp_path):
    run, rollout = exact_run(tmp_path, train__ema=True, train__ema_update_every=2)
    average = run.model.shift.detach().clone()
    for update in range(1, 7):
        step_taken(run, [rollout])
        if update % 2 == 0:
            decay = min(0.9, update / (9 + update))
            average = decay * average + (1 - decay) * run.model.shift.detach()
        with run.snapshots.using("ema"):
            close(run.model.shift.detach(), average, atol=1e-6)
