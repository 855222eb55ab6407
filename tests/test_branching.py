"""Rollouts that branch: who goes on from whom, what it costs, what a step is credited with."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from fixtures import F64, close
from test_segments import NUM_STEPS, SIZE, calls_of, walk
from toy import plan_of

from config.base import base
from flow_grpo import rollouts
from flow_grpo.objectives import credit
from flow_grpo.objectives.forward.nft import NFT
from flow_grpo.objectives.ratio.grpo import GRPO
from flow_grpo.records import RowTable
from flow_grpo.sampling import Schedule

STEPS = {0: (1, 2), 1: (0, 2), 2: (2, 4), 3: (1, 3)}  # of each group


def steps_of(groups):
    return np.array([STEPS[group] for group in groups])


def table(rollout):
    """What collect.table_of() makes of one rank's rows."""
    return RowTable(
        group=rollout.batch.group,
        member=rollout.batch.member,
        rank=torch.zeros(len(rollout), dtype=torch.int64),
        leaf=rollout.leaf,
        parent=rollout.parent[:, 0],
        steps=rollout.steps,
        branch=torch.tensor([(-1, *row.branch)[-1] for row in rollout.batch.owners]),
    )


def drawn(branching, members, batch_size):
    rows = [(g, m) for g in STEPS for m in range(members)]
    calls = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    made = rollouts.BRANCHINGS[branching](calls, steps_of, NUM_STEPS, members)
    rollout, forwards = walk(made, same_latent=False)
    assert rollouts.num_forwards(made) == forwards
    return rollout, forwards


def objective(cls=GRPO, **keys):
    config = base("grpo" if cls is GRPO else "nft")
    config.sample.global_std = False
    config.update_from_flattened_dict({key.replace("__", "."): keys[key] for key in keys})
    return cls(config, Schedule(torch.linspace(1, 0, NUM_STEPS + 1)))


@pytest.mark.parametrize("batch_size", [3, 6, 12])
def test_each_of_a_groups_steps_has_its_own_branches_of_the_trunk(batch_size):
    rollout, _ = drawn("per_step", 6, batch_size)
    leaves = torch.nonzero(rollout.leaf).flatten()
    assert len(leaves) == 24 and rollout.steps[leaves].shape == (24, 1)
    for group, steps in STEPS.items():
        mine = leaves[rollout.batch.group[leaves] == group]
        assert Counter(rollout.steps[mine, 0].tolist()) == dict.fromkeys(steps, 3)
        for step in steps:
            at = mine[rollout.steps[mine, 0] == step]
            assert (rollout.latents[at] == rollout.latents[at[0]]).all()  # one state
            assert len(set(rollout.next_latents[at].flatten().tolist())) == 3 * 4
    # All of a group's states lie on one path without noise.
    alone, _ = walk(rollouts.independent([[(2, 0)]], lambda g: steps_of(g)[:, :0], NUM_STEPS))
    assert alone.final.shape == (1, 4)


def test_branches_per_step_cost_a_trunk_and_what_lies_behind_their_step():
    rows = [(2, m) for m in range(4)]
    calls = [rows[:2], rows[2:]]  # a call holds the branches of one step
    made = rollouts.per_step(calls, steps_of, NUM_STEPS, 4)
    first, last = STEPS[2]
    assert rollouts.num_forwards(made) == last + 2 * (NUM_STEPS - first) + 2 * (NUM_STEPS - last)


def test_branches_of_a_step_are_compared_with_each_other_alone():
    rollout, _ = drawn("per_step", 6, 6)
    rows, leaf = table(rollout), rollout.leaf
    scores = torch.full((len(rows),), math.nan, dtype=F64)
    generator = torch.Generator().manual_seed(0)
    scores[leaf] = torch.rand(24, generator=generator, dtype=F64)
    scores[leaf] += 10 * (rows.steps[leaf, 0] == 2)  # what an earlier step's branches score
    arranged = objective().arrange(scores, rows, plan_of(4, 6, 4), 0)
    for group, steps in STEPS.items():
        for step in steps:
            mine = (rows.group == group) & leaf & (rows.steps[:, 0] == step)
            own = scores[mine]
            expected = (own - own.mean()) / (own.std(correction=0) + 1e-4)
            close(arranged.advantages[mine], expected, atol=1e-12)
    assert (arranged.weights == leaf).all() and (arranged.advantages[~leaf] == 0).all()


def test_a_steps_two_images_lie_behind_strides_of_one_and_two():
    rollout, forwards = drawn("strides", 8, 8)
    rows = table(rollout)
    nodes = torch.nonzero((rows.steps[:, 0] >= 0) & ~rows.leaf).flatten()
    leaves = torch.nonzero(rows.leaf).flatten()
    assert len(nodes) == 16 and len(leaves) == 32
    assert (rows.steps[leaves] == -1).all() and (rows.steps[nodes] >= 0).all()
    for node in nodes.tolist():
        below = leaves[rows.parent[leaves] == node]
        assert sorted(rows.branch[below].tolist()) == [0, 1]
    # Behind step 4 of 6 one step is left, whatever the stride: two of 16 pairs are alike.
    assert len(set(map(tuple, rollout.final[leaves].tolist()))) == 30


def test_a_step_is_credited_with_both_of_its_images_each_beside_its_like():
    rollout, _ = drawn("strides", 8, 8)
    rows, leaf = table(rollout), rollout.leaf
    scores = torch.full((len(rows),), math.nan, dtype=F64)
    scores[leaf] = torch.rand(32, generator=torch.Generator().manual_seed(1), dtype=F64)
    scores[leaf] += 100 * rows.branch[leaf]  # a coarse image scores otherwise
    missing = torch.nonzero(leaf).flatten()[-1]
    scores[missing] = math.nan
    arranged = objective(sample__branching="strides").arrange(scores, rows, plan_of(4, 8, 4), 0)
    nodes = (rows.steps[:, 0] >= 0) & ~leaf
    for node in torch.nonzero(nodes).flatten().tolist():
        expected = 0.0
        for leaf_row in torch.nonzero(rows.parent == node).flatten().tolist():
            like = leaf & (rows.branch == rows.branch[leaf_row]) & (rows.group == rows.group[node])
            like &= rows.steps[rows.parent, 0] == rows.steps[node, 0]
            own = scores[like & ~scores.isnan()]
            if not scores[leaf_row].isnan():
                part = scores[leaf_row] - own.mean()
                expected += (part / (own.std(correction=0) + 1e-4)).item()
        assert arranged.advantages[node].item() == pytest.approx(expected, abs=1e-9)
        assert arranged.weights[node] == float(node != rows.parent[missing])
    assert (arranged.weights[~nodes] == 0).all()
    numbers = np.concatenate([m for u in arranged.updates[0] for m in u[0]])
    trained = torch.nonzero(arranged.weights).flatten().tolist()
    assert sorted(numbers[numbers >= 0]) == trained


def test_a_tree_splits_at_each_step_and_its_nodes_share_what_lies_before():
    rollout, forwards = drawn("tree", 9, 3)  # 3 x 3
    rows = table(rollout)
    trained = torch.nonzero(rows.steps[:, 0] >= 0).flatten()
    per_group = Counter(rows.group[trained].tolist())
    assert per_group == dict.fromkeys(STEPS, 3 + 9)
    for group, (first, second) in STEPS.items():
        mine = trained[rows.group[trained] == group]
        steps = Counter(rows.steps[mine, 0].tolist())
        assert steps == {first: 3, second: 9}
        tops = mine[rows.steps[mine, 0] == first]
        assert (rollout.latents[tops] == rollout.latents[tops[0]]).all()
        assert ((rows.parent[tops] >= 0) == (first > 0)).all()  # they go on from a trunk
        for top in tops.tolist():
            below = mine[rows.parent[mine] == top]
            assert len(below) == 3 and rows.leaf[below].all()
            assert (rollout.latents[below] == rollout.latents[below[0]]).all()
            finals = rollout.final[below]
            assert len(set(map(tuple, finals.tolist()))) == 3


def test_a_tree_costs_each_piece_of_a_path_once():
    steps = STEPS[3]
    made = rollouts.tree([[(3, m) for m in range(4)]], steps_of, NUM_STEPS, 4)
    first, second = steps
    expected = first + 2 * (second - first) + 4 * (NUM_STEPS - second)
    assert rollouts.num_forwards(made) == expected < 4 * NUM_STEPS


def test_a_nodes_value_is_the_mean_of_its_leaves_compared_at_its_depth():
    rollout, _ = drawn("tree", 4, 4)
    rows, leaf = table(rollout), rollout.leaf
    scores = torch.full((len(rows),), math.nan, dtype=F64)
    scores[leaf] = torch.rand(16, generator=torch.Generator().manual_seed(2), dtype=F64)
    scores[torch.nonzero(leaf).flatten()[0]] = math.nan
    values = credit.mean_below(scores, rows)
    arranged = objective(sample__branching="tree").arrange(scores, rows, plan_of(4, 4, 4), 0)
    for node in torch.nonzero(rows.steps[:, 0] >= 0).flatten().tolist():
        below = scores[rows.parent == node] if not leaf[node] else scores[[node]]
        value = below[~below.isnan()].mean()
        if value.isnan():
            assert arranged.weights[node] == 0
            continue
        close(values[node], value, atol=1e-12)
        like = (rows.group == rows.group[node]) & (rows.steps[:, 0] == rows.steps[node, 0])
        own = values[like & ~values.isnan()]
        expected = (value - own.mean()) / (own.std(correction=0) + 1e-4)
        close(arranged.advantages[node], expected, atol=1e-9)
        assert arranged.weights[node] == 1


def test_of_a_tree_some_depths_train_that_move_on_with_the_epochs():
    rollout, _ = drawn("tree", 4, 4)
    rows = table(rollout)
    scores = torch.full((len(rows),), math.nan, dtype=F64)
    scores[rows.leaf] = torch.rand(16, generator=torch.Generator().manual_seed(3), dtype=F64)
    trained = zip(rows.group.tolist(), rows.steps[:, 0].tolist(), strict=True)
    depth = torch.tensor([STEPS[g].index(step) if step >= 0 else -1 for g, step in trained])
    plan, keys = plan_of(4, 4, 4), {"sample__branching": "tree", "train__tree_dwell": 2}
    every = objective(**keys).arrange(scores, rows, plan, 0)
    for epoch, wanted in enumerate([0, 0, 1, 1, 0]):
        found = objective(**keys, train__tree_depths=1).arrange(scores, rows, plan, epoch)
        assert torch.equal(found.weights > 0, depth == wanted)
        assert torch.equal(found.advantages, every.advantages)
        assert trained_numbers(found) == torch.nonzero(depth == wanted).flatten().tolist()
    most = objective(**keys, train__tree_depths=2).arrange(scores, rows, plan, 3)
    assert torch.equal(most.weights, every.weights)


def test_an_objective_on_final_images_trains_the_leaves_of_a_tree():
    rollout, _ = drawn("tree", 4, 4)
    rows = table(rollout)
    rows.steps = rows.steps[:, :0]
    scores = torch.where(rows.leaf, torch.arange(len(rows)).double(), math.nan)
    found = objective(NFT, sample__branching="tree")
    arranged = found.arrange(scores, rows, plan_of(4, 4, 4), 0)
    assert not found.selects and (arranged.weights == rows.leaf).all()
    assert arranged.advantages[rows.leaf].abs().min() > 0


def flat(scores, members):
    """Rows that were drawn alone, one group after the other."""
    number = torch.arange(len(scores))
    return RowTable(
        group=number // members,
        member=number % members,
        rank=torch.zeros_like(number),
        leaf=torch.ones_like(number, dtype=torch.bool),
        parent=torch.full_like(number, -1),
        steps=torch.ones(len(scores), 2, dtype=torch.int64),
        branch=torch.full_like(number, -1),
    )


def trained_numbers(arranged):
    numbers = np.concatenate([m for u in arranged.updates[0] for m in u[0]] or [np.empty(0)])
    return sorted(numbers[numbers >= 0].tolist())


def test_groups_of_equal_scores_are_dropped_and_cost_nothing():
    scores = torch.tensor([1, 2, 3, 2, 5, 5, 5, 5, 1, math.nan, 0, 1], dtype=F64)
    rows, plan = flat(scores, 4), plan_of(3, 4, 6)
    arranged = objective(train__drop_equal_groups=True).arrange(scores, rows, plan, 0)
    assert trained_numbers(arranged) == [0, 1, 2, 3, 8, 10, 11]
    assert arranged.weights.nonzero().flatten().tolist() == [0, 1, 2, 3, 8, 10, 11]
    kept = objective().arrange(scores, rows, plan, 0)
    assert trained_numbers(kept) == list(range(12))
    assert torch.equal(kept.advantages, arranged.advantages)
    nothing = objective(train__drop_equal_groups=True).arrange(
        torch.ones(12, dtype=F64), rows, plan, 0
    )
    assert trained_numbers(nothing) == [] and nothing.weights.sum() == 0


def test_the_best_and_the_worst_of_a_group_train_with_the_advantages_of_all():
    scores = torch.tensor([3, 1, 2, 2, 5, math.nan, 6, 4], dtype=F64)
    rows, plan = flat(scores, 4), plan_of(2, 4, 8)
    found = objective(train__best_and_worst=1)
    arranged = found.arrange(scores, rows, plan, 0)
    assert found.selects and trained_numbers(arranged) == [0, 1, 6, 7]
    assert torch.equal(arranged.advantages, objective().arrange(scores, rows, plan, 0).advantages)
    most = objective(train__best_and_worst=2).arrange(scores, rows, plan, 0)
    assert trained_numbers(most) == [0, 1, 2, 3, 4, 6, 7]


def test_a_sharing_that_is_exact_is_the_prefixs_alone():
    calls = calls_of(SIZE)
    assert rollouts.BRANCHINGS["none"] is rollouts.independent
    assert rollouts.tree_width(27, 3) == 3 and rollouts.tree_width(24, 3) == 0
    assert len(rollouts.independent(calls, steps_of, NUM_STEPS)) == len(calls)


def test_strides_cost_a_trunk_the_steps_and_both_walks_behind_them():
    first, last = STEPS[2]
    rows = [(2, m) for m in range(8)]  # two branches a step
    made = rollouts.strides(
        [rows[0::2][:2], rows[1::2][:2], rows[4::2], rows[5::2]], steps_of, 6, 8
    )
    expected = last + 4  # the trunk, and the steps
    for step in (first, last):
        left = NUM_STEPS - step - 1
        expected += 2 * left + 2 * math.ceil(left / 2)
    assert rollouts.num_forwards(made) == expected
