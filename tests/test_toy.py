"""The toy of toy.py, trained end to end."""

import json
import math

import numpy as np
import pytest
import torch
from toy import make_run, plan_of, roll_out, train_epoch

from flow_grpo.sampling import replay


def gain(folder, seed, shuffled):
    """Train for 50 updates.

    Returns how much the mean reward of the last ten exceeds that of the first ten, and the same in
    standard errors.
    """
    run = make_run(
        folder,
        plan_of(num_groups=8, group_size=16),
        torch.optim.Adam,
        seed=seed,
        sample__sde_window_size=2,
        sample__same_latent=True,
        train__learning_rate=0.05,
        train__clip_range=0.1,
        train__shuffle_advantages=shuffled,
    )
    rewards = []
    for epoch in range(50):
        run.epoch = epoch
        rewards.append(train_epoch(run)["reward/avg"])
    assert run.updater.num_updates == 50 and run.updater.num_skipped == 0
    first, last = np.array(rewards[:10]), np.array(rewards[-10:])
    gained = last.mean() - first.mean()
    return gained, gained / math.sqrt((first.var(ddof=1) + last.var(ddof=1)) / 10)


# Ten seeds gained 0.29 to 0.38 (7 to 13 standard errors), and -0.08 to 0.09 if dealt at random.
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_reward_rises(tmp_path, seed):
    gained, standard_errors = gain(tmp_path, seed, shuffled=False)
    assert gained > 0.2 and standard_errors > 5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_reward_stays_where_advantages_are_dealt_at_random(tmp_path, seed):
    gained, _ = gain(tmp_path, seed, shuffled=True)
    assert abs(gained) < 0.15


@pytest.mark.parametrize("old_log_prob", ["rollout", "replay"])
def test_the_first_update_of_an_epoch_sees_ratio_one_and_the_second_does_not(
    tmp_path, old_log_prob
):
    run = make_run(
        tmp_path,
        plan_of(4, 6, num_micro_batches=4, num_updates=2),
        torch.optim.Adam,
        sample__sde_window_size=3,
        train__old_log_prob=old_log_prob,
    )
    train_epoch(run)
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["ratio"] == 1 and first["approx_kl"] == first["clip_high"] == 0
    assert second["approx_kl"] > 0


def test_every_step_of_every_row_draws_its_own_standard_normal_noise(tmp_path):
    run = make_run(tmp_path, plan_of(num_groups=8, group_size=16), torch.optim.SGD)
    rollout, noises = roll_out(run), []
    for column, steps in enumerate(rollout.steps.unbind(1)):
        latents = rollout.latents[:, column]
        velocity = run.model(latents, run.schedule.sigmas[steps]).detach()
        taken = replay(run.schedule, rollout, column, velocity)
        noises.append((taken.next_latents - taken.mean) / taken.std)
    noises = torch.stack(noises)  # (steps, rows, elements)
    count = noises[0].numel()
    for axis in (0, 1):
        neighbours = noises.roll(1, axis) * noises
        assert neighbours.mean((1, 2)).abs().max() < 4.5 / math.sqrt(count)
    assert (noises.std((1, 2)) - 1).abs().max() < 4.5 / math.sqrt(2 * count)
    assert noises.mean((1, 2)).abs().max() < 4.5 / math.sqrt(count)


ON_IMAGES = {  # objectives at fresh noisings, and what the toy needs of them
    "nft": {"nft__kl_beta": 0.0},
    "awm": {},
    "vgrpo": {"forward__levels": "uniform"},  # it has sigmas of the grid alone
    "epg": {},
    "ram": {},
    "crd": {"forward__kl_beta": 0.0},
    "dgpo": {},
}


def gain_on_images(folder, objective, shuffled):
    """Return how far the mean reward of three epochs exceeds that of the first three."""
    run = make_run(
        folder,
        plan_of(8, 16, num_micro_batches=2, num_updates=2),
        torch.optim.Adam,
        objective=objective,
        sample__noise_level=0.0,
        train__learning_rate=0.05,
        train__shuffle_advantages=shuffled,
        **ON_IMAGES[objective],
    )
    rewards = []
    for epoch in range(8):
        run.epoch = epoch
        rewards.append(train_epoch(run)["reward/avg"])
        run.objective.after_epoch(run.snapshots, run.updater.num_updates)
    return np.mean(rewards[-3:]) - np.mean(rewards[:3])


# Three seeds gained .40 to .57 (RAM .26 to .31, DGPO .10 to .29); dealt at random -.17 to .16.
@pytest.mark.parametrize("objective", ON_IMAGES)
def test_the_reward_rises_by_losses_on_images(tmp_path, objective):
    assert gain_on_images(tmp_path, objective, shuffled=False) > 0.2
    assert abs(gain_on_images(tmp_path, objective, shuffled=True)) < 0.15
