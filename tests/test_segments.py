"""Rollouts in segments: a shared prefix changes nothing but the number of forwards; branches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fixtures import blank_batch, clean_grid
from toy import Toy

from flow_grpo import rollouts
from flow_grpo.randomness import Randomness
from flow_grpo.records import Rollout
from flow_grpo.rollouts import Row
from flow_grpo.sampling import Schedule, denoise, parents

NUM_STEPS, GROUPS, SIZE = 6, 4, 3
STARTS = {0: 2, 1: 0, 2: 3, 3: 2}  # of each group's window of two steps
SIGMAS = torch.tensor(clean_grid(NUM_STEPS), dtype=torch.float64)
KEEP = ("states", "log_probs", "means")


def steps_of(groups):
    return np.array([[STARTS[g], STARTS[g] + 1] for g in groups])


def calls_of(batch_size):
    rows = [(g, m) for g in range(GROUPS) for m in range(SIZE)]
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]


def walk(calls, same_latent=True):
    """Denoise by the toy's closed form in fp64; returns the rollout and the number of forwards."""
    pipeline, forwards = Toy(SIGMAS), []
    initial = pipeline.initial_latents
    pipeline.initial_latents = lambda size, noise: initial(size, noise.double())

    def model(latents, sigma):
        forwards.append(len(latents))
        return pipeline.transformer(latents, sigma)

    schedule = Schedule(SIGMAS, "sde", 0.7, same_latent)
    save, done = rollouts.states_to_save(calls), []
    for call, indices in zip(calls, save, strict=True):
        rows = torch.tensor([row[:2] for row in call.rows])
        batch = replace(blank_batch(*rows.unbind(1)), owners=call.rows)
        done.append(
            denoise(
                pipeline,
                model,
                batch,
                schedule,
                Randomness(7, (3,)),
                call.segment,
                leaf=call.leaf,
                keep=KEEP,
                start=parents(done, call.segment),
                save=indices,
            )
        )
    return Rollout.cat([part.rollout for part in done]), sum(forwards)


def test_rows_walk_from_noise_to_the_image_with_their_own_stochastic_steps():
    (call,) = rollouts.independent([[(0, 0), (2, 1)]], steps_of, NUM_STEPS)
    assert call.segment.grid.tolist() == [list(range(NUM_STEPS + 1))] * 2
    assert call.segment.kept(0).tolist() == [[2, 3], [3, 4]]
    assert call.segment.kept(1).tolist() == [[3, 4], [4, 5]]
    assert (call.segment.parent == -1).all() and call.leaf


@pytest.mark.parametrize("batch_size", [3, 4, 12])
def test_a_shared_prefix_gives_the_rollout_of_rows_that_walk_alone(batch_size):
    alone, all_forwards = walk(rollouts.independent(calls_of(batch_size), steps_of, NUM_STEPS))
    calls = rollouts.shared_prefix(calls_of(batch_size), steps_of, NUM_STEPS)
    shared, forwards = walk(calls)
    assert rollouts.num_forwards(calls) == forwards
    if batch_size == SIZE:  # else a call's rows wait for the group that starts first
        assert forwards < all_forwards
    leaves = torch.nonzero(shared.leaf).flatten()
    assert len(shared) - len(leaves) == 3  # group 1 starts with a stochastic step
    shared = shared.rows(leaves)
    for name in ("steps", "next_steps"):
        assert torch.equal(getattr(shared, name), getattr(alone, name))
    for name in ("latents", "next_latents", "log_probs", "means", "final"):
        torch.testing.assert_close(getattr(shared, name), getattr(alone, name), rtol=0, atol=1e-12)


def test_a_shared_prefix_costs_its_steps_once_a_group():
    calls = rollouts.shared_prefix(
        calls_of(SIZE), lambda groups: steps_of([0] * len(list(groups))), 6
    )
    # Each group: 2 steps once and 4 for each of its 3 rows; unshared, 6 for each.
    assert rollouts.num_forwards(calls) == GROUPS * (2 + SIZE * 4)


def test_branches_share_a_trunk_and_differ_by_their_noise_alone():
    calls = rollouts.branches(calls_of(SIZE), steps_of, NUM_STEPS)
    rollout, _ = walk(calls, same_latent=False)
    leaves = rollout.rows(torch.nonzero(rollout.leaf).flatten())
    assert len(leaves) == GROUPS * SIZE
    for group in range(GROUPS):
        mine = leaves.rows(torch.nonzero(leaves.batch.group == group).flatten())
        assert [row.branch for row in mine.batch.owners] == [(0,), (1,), (2,)]
        assert (mine.latents[:, 0] == mine.latents[:1, 0]).all()
        assert len(mine.final[:, 0].unique()) == SIZE
        trunk = mine.parent[0]
        assert (mine.parent == trunk).all()
        if STARTS[group]:
            assert rollout.batch.owners[trunk[0]] == Row(group, 0)
            assert torch.equal(rollout.final[trunk[0]], mine.latents[0, 0])


def test_a_noise_level_of_zero_makes_every_row_of_a_group_its_trunk():
    calls = rollouts.branches(calls_of(SIZE), steps_of, NUM_STEPS)
    saved = rollouts.states_to_save(calls)
    assert saved[0] == {2, 3} and not any(saved[1:])


def test_parts_of_unequal_steps_are_put_together_with_zeros_behind():
    calls = rollouts.branches(calls_of(SIZE), steps_of, NUM_STEPS)
    rollout, _ = walk(calls)
    assert rollout.steps.shape == (GROUPS * SIZE + 3, 2)
    trunks = ~rollout.leaf
    assert (rollout.latents[trunks] == 0).all() and (rollout.log_probs[trunks] == 0).all()
