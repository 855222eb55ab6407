"""Who trains when: all ranks' rows, cut in order or in sets, equally many calls on every rank."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fixtures import blank_batch
from toy import plan_of

from flow_grpo.records import Arranged, Rollout, RowTable
from flow_grpo.training import arrange


def plan(num_ranks=2, micro_batch_size=4, num_updates=2, num_inner_epochs=1):
    return replace(
        plan_of(4, 4),
        world_size=num_ranks,
        micro_batch_size=micro_batch_size,
        num_updates=num_updates,
        num_inner_epochs=num_inner_epochs,
    )


def table(num_ranks=2, num_rows=16):
    rows = torch.arange(num_rows)
    return RowTable(
        group=rows // 4,
        member=rows % 4,
        rank=rows // (num_rows // num_ranks),
        leaf=torch.ones(num_rows, dtype=torch.bool),
        parent=torch.full((num_rows,), -1),
        steps=torch.zeros(num_rows, 1, dtype=torch.int64),
        branch=torch.full((num_rows,), -1),
    )


def rollout(num_rows=8):
    rows = torch.arange(num_rows)
    none = torch.zeros(num_rows, 0)
    return Rollout(
        batch=blank_batch(rows // 4, rows % 4),
        steps=none.long(),
        next_steps=none.long(),
        latents=none,
        next_latents=none,
        log_probs=none,
        final=rows.float(),
        leaf=torch.ones(num_rows, dtype=torch.bool),
        parent=torch.full((num_rows, 2), -1),
        weights=torch.ones(num_rows),
    )


def flat(updates):
    return [[np.concatenate(of_rank).tolist() for of_rank in update] for update in updates]


@pytest.mark.parametrize("num_inner_epochs", [1, 3])
def test_in_order_every_rank_trains_each_of_its_rows_once_an_inner_epoch(num_inner_epochs):
    rows = [np.arange(8), np.arange(8, 16)]
    for updates in plan(num_inner_epochs=num_inner_epochs).in_order(rows, epoch=3):
        for rank, mine in enumerate(rows):
            seen = [n for update in flat(updates) for n in update[rank]]
            assert sorted(seen) == mine.tolist()
            assert all(len(micro) == 4 for update in updates for micro in update[rank])


def test_the_updates_of_two_ranks_are_those_of_one():
    two = plan(num_ranks=2).in_order([np.arange(8), np.arange(8, 16)], epoch=5)[0]
    one = plan(num_ranks=1).in_order([np.arange(16)], epoch=5)[0]
    assert [sorted(sum(update, [])) for update in flat(two)] == [
        sorted(sum(update, [])) for update in flat(one)
    ]


def test_sets_lie_whole_in_micro_batches_and_what_is_short_is_filled_up():
    pairs = [[np.array([0, 3]), np.array([5, 4]), np.array([6, 7])], [np.array([9, 8])]]
    rows = [np.arange(8), np.arange(8, 16)]
    (updates,) = plan(micro_batch_size=4).in_sets(pairs, rows, epoch=1)
    sizes = {tuple(len(micro) for micro in of_rank) for update in updates for of_rank in update}
    assert sizes == {(4,)}
    real = [n for update in flat(updates) for of_rank in update for n in of_rank if n >= 0]
    assert sorted(real) == [0, 3, 4, 5, 6, 7, 8, 9]
    filled = {n for update in flat(updates) for of_rank in update for n in of_rank if n < 0}
    assert filled <= {~0, ~8}
    for update in updates:
        for of_rank in update:
            kept = of_rank[0][of_rank[0] >= 0].reshape(-1, 2).tolist()
            assert all(pair in ([0, 3], [5, 4], [6, 7], [9, 8]) for pair in kept)


def test_rows_in_sequence_are_views_and_rows_that_fill_up_have_weight_zero():
    rows = rollout()
    part = arrange.take_rows(rows, np.array([10, 11, 12]), first=8)
    assert part.final.tolist() == [2, 3, 4]
    assert part.final.data_ptr() == rows.final[2:].data_ptr()
    part = arrange.take_rows(rows, np.array([12, 9, ~8]), first=8)
    assert part.final.tolist() == [4, 1, 0] and part.weights.tolist() == [1, 1, 0]
    assert rows.weights.tolist() == [1] * 8
    assert part.batch.member.tolist() == [0, 1, 0]


def test_weights_are_summed_over_rows_and_points_without_what_fills_up():
    weights = torch.tensor([1.0, 0, 2, 4], dtype=torch.float64)
    update = [[np.array([0, 1])], [np.array([3, ~2])]]
    arranged = Arranged([], weights, weights)
    assert arrange.total_weight(arranged, update, num_points=3) == 3 * 5
    of_steps = torch.stack([weights, 10 * weights], dim=1)
    arranged = Arranged([], of_steps, of_steps)
    assert arrange.total_weight(arranged, update, num_points=2) == 5 + 50
    assert arrange.trained_rows(arranged, np.array([0, 1]), column=1).tolist() == [0]
    assert arrange.trained_rows(arranged, np.array([3, ~2]), column=0).tolist() == [0]
    assert arrange.trained_rows(arranged, np.array([3, 2]), column=0) is None


def test_unequal_calls_and_rows_of_another_rank_are_found():
    rows, weights = table(), torch.ones(16)
    good = [[[[np.arange(4)], [np.arange(8, 12)]]]]
    arrange.check(Arranged(good, weights, weights), rows, plan())
    for update in (
        [[np.arange(4)], [np.arange(8, 11)]],
        [[np.arange(4)], []],
        [[np.arange(8, 12)], [np.arange(8, 12)]],
        [[np.arange(4)]],
    ):
        with pytest.raises(AssertionError):
            arrange.check(Arranged([[update]], weights, weights), rows, plan())
