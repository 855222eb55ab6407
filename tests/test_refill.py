"""Groups of equal scores are replaced by further prompts, equally many calls on all ranks."""

import ml_collections
import pytest
import running
import torch
from forking import ON_CPU, on_ranks
from toy import plan_of

from flow_grpo.launch import preflight
from flow_grpo.training import collect

DULL = {0, 1, 2, 4}  # slots whose images all get one score


def scored(run, sampled):
    """The rewards of a run whose groups of DULL teach nothing."""
    rollout = sampled.rollout
    group = rollout.batch.group[rollout.leaf]
    dull = torch.tensor([g in DULL for g in group.tolist()])
    average = torch.where(dull, 0.5, torch.arange(len(group)) % 7 + 0.1 * group).double().numpy()
    sampled.scoring.result(60)
    return {"jpeg_incompressibility": average, "avg": average}


def prepared(files, folder, **keys):
    keys = {"train__drop_equal_groups": True, "sample__max_refills": 3} | keys
    return running.prepare(running.arguments(files, logdir=folder, run_name="refill", **keys))


def groups_of(rollout):
    return sorted(set(rollout.batch.group.tolist()))


def test_as_many_groups_train_as_planned(files, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "score", scored)
    run = prepared(files, tmp_path)
    sampled, scores = collect.collect(run, 0, for_gate=True)
    assert groups_of(sampled.rollout) == list(range(8))  # 4, then 3 for 0 to 2, then 1 for 4
    assert len(sampled.images) == len(scores["avg"]) == 32 and sum(map(len, sampled.for_gate)) == 4
    arranged, metrics = collect.weigh(run, sampled, scores, 0)
    assert metrics["images"] == 32
    trained = sampled.rollout.batch.group[arranged.weights > 0]
    assert sorted(set(trained.tolist())) == [3, 5, 6, 7] and len(trained) == 16
    again, _ = collect.collect(run, 0)
    assert torch.equal(again.rollout.final, sampled.rollout.final)  # of names alone
    assert again.rollout.batch.prompts == sampled.rollout.batch.prompts
    other, _ = collect.collect(run, 1)
    assert other.rollout.batch.prompts[16:] != sampled.rollout.batch.prompts[16:]


def test_it_ends_after_max_refills_and_without_dull_groups_at_once(files, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "score", scored)
    run = prepared(files, tmp_path, sample__max_refills=1)
    assert groups_of(collect.collect(run, 0)[0].rollout) == list(range(7))
    monkeypatch.setitem(globals(), "DULL", set())
    assert groups_of(collect.collect(run, 0)[0].rollout) == list(range(4))


def test_the_rows_of_a_refill_go_on_from_rows_of_their_own(files, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "score", scored)
    run = prepared(files, tmp_path, sample__branching="trunk", sample__sde_window_range=(1, 4))
    rollout = collect.collect(run, 0)[0].rollout
    with_parent = torch.nonzero(rollout.parent[:, 0] >= 0).flatten()
    assert len(with_parent) == 32
    parents = rollout.parent[with_parent, 0]
    group = rollout.batch.group
    assert (group[with_parent] == group[parents]).all() and not rollout.leaf[parents].any()


def as_rank(files, folder):
    collect.score = scored
    run = prepared(files, folder, sample__num_batches_per_epoch=2)
    sampled, scores = collect.collect(run, 0)
    torch.save((sampled.rollout.final, scores["avg"]), f"{folder}/{run.ranks.rank}.pt")
    running.entry.leave(0)


def test_two_ranks_refill_as_one_does(files, tmp_path, monkeypatch):
    on_ranks(2, ON_CPU, as_rank, files, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    monkeypatch.setattr(collect, "score", scored)
    run = prepared(files, tmp_path / "one")
    sampled, scores = collect.collect(run, 0)
    # A part of two ranks may be larger than needed, as each makes whole calls.
    whole = {tuple(row.flatten().tolist()) for row in sampled.rollout.final}
    halves = [tuple(row.flatten().tolist()) for final, _ in parts for row in final]
    assert len(parts[0][0]) == len(parts[1][0])
    assert whole <= set(halves) and len(halves) == len(set(halves))


@pytest.mark.parametrize(
    ("world", "rows", "num_batches", "size", "wanted", "expected"),
    [
        (1, 4, 4, 4, 3, (3, 3)),  # groups, calls of each rank
        (2, 4, 2, 4, 3, (4, 2)),
        (2, 3, 2, 4, 1, (3, 2)),  # 12 rows are 3 groups
        (2, 3, 4, 4, 1, (6, 4)),  # a rank has whole groups
        (3, 8, 2, 24, 1, (1, 1)),
    ],
)
def test_a_refill_is_the_smallest_that_all_ranks_can_draw(
    world, rows, num_batches, size, wanted, expected
):
    sample = ml_collections.ConfigDict(
        {"train_batch_size": rows, "num_batches_per_epoch": num_batches}
    )
    plan = plan_of(world * rows * num_batches // size or 1, size, world_size=world)
    part = plan.refill(sample, 7, wanted)
    assert part == (7, *expected)


def test_refills_without_dropped_groups_are_refused(files, tmp_path):
    run = prepared(files, tmp_path)
    with run.config.unlocked():
        run.config.train.drop_equal_groups, run.config.run_name = False, ""
    with pytest.raises(ValueError, match="config.sample.max_refills=3") as error:
        preflight.check(run.config, 1)
    assert "Set config.train.drop_equal_groups=True" in str(error.value)
