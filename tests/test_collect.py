"""What an epoch hands to its updates, on a tiny pipeline: prompts, windows, advantages, weights.

Each group of four is sampled in two calls, and one prompt stands twice in the data set.
"""

import pytest
import running
import torch

from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.rules.jpeg import jpeg_incompressibility
from flow_grpo.training import collect

pytestmark = pytest.mark.usefixtures("fresh_logs")

LINES = ["a cat", "a cat", "three green cubes", "a sign", "two dogs"]
NUM_GROUPS = GROUP_SIZE = 4
BATCH_SIZE = 2


@pytest.fixture
def arguments(files, tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text("\n".join(LINES))

    def make(**overrides):
        return running.arguments(
            files,
            dataset=tmp_path,
            sample__train_batch_size=BATCH_SIZE,
            sample__num_batches_per_epoch=NUM_GROUPS * GROUP_SIZE // BATCH_SIZE,
            sample__num_image_per_prompt=GROUP_SIZE,
            **{"sample__global_std": True} | overrides,
        )

    return make


def epochs(run, number):
    for epoch in range(number):
        sampled = collect.roll_out(run, epoch)
        collect.weigh(run, sampled, collect.score(run, sampled), epoch)
        yield sampled.rollout


def grouped(values):
    return values.unflatten(0, (NUM_GROUPS, GROUP_SIZE))


def test_an_advantage_belongs_to_the_picture_beside_it(arguments):
    run = running.prepare(arguments(sample__sde_window_size=0, seed=7))  # one first step
    for rollout in epochs(run, 2):
        decoded = (
            run.pipeline.decode(z, run.evaluator.size) for z in rollout.final.split(BATCH_SIZE)
        )
        pictures = [
            picture
            for call in decoded
            for picture in (call.movedim(1, -1) * 255).round().to(torch.uint8).numpy()
        ]
        none = [None] * len(pictures)
        rewards = jpeg_incompressibility(Batch(pictures, none, none))["jpeg_incompressibility"]
        rewards = grouped(torch.from_numpy(rewards))
        expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(correction=0) + 1e-4)
        assert len(expected.unique()) == expected.numel()
        torch.testing.assert_close(grouped(rollout.advantages), expected.float())
        assert (rollout.weights == 1).all()


def test_every_lap_through_the_prompts_holds_each_line_once(arguments):
    run, slots = running.prepare(arguments()), []
    for rollout in epochs(run, 5):
        prompts = rollout.batch.prompts
        slots += prompts[::GROUP_SIZE]
        assert [p for p in prompts[::GROUP_SIZE] for _ in range(GROUP_SIZE)] == prompts
        assert grouped(rollout.batch.group).tolist() == [[g] * GROUP_SIZE for g in range(4)]
        assert grouped(rollout.batch.member).tolist() == [[0, 1, 2, 3]] * NUM_GROUPS
    laps = [slots[i : i + len(LINES)] for i in range(0, len(slots), len(LINES))]
    assert len(laps) == 4 and all(sorted(lap) == sorted(LINES) for lap in laps)


def test_a_group_has_one_window_and_groups_and_epochs_have_others(arguments):
    run, windows = running.prepare(arguments()), []
    for rollout in epochs(run, 4):
        steps = grouped(rollout.steps)
        assert (steps == steps[:, :1]).all()
        windows.append(steps[:, 0, 0])
    windows = torch.stack(windows)  # (epochs, groups)
    assert (windows != windows[:1]).any() and (windows != windows[:, :1]).any()


def test_nft_samples_with_its_old_policy(arguments):
    run = running.prepare(arguments(objective="nft", sample__noise_level=0.0))
    (before,) = epochs(run, 1)
    with torch.no_grad():
        for _, param in running.trained_parameters(run):
            param.mul_(1.1)
    (after,) = epochs(run, 1)
    assert torch.equal(after.final, before.final)
    run.snapshots.update("old", 0.0)
    (moved,) = epochs(run, 1)
    assert not torch.equal(moved.final, before.final)


def test_rewards_are_normalised_among_the_branches_of_a_step(arguments, monkeypatch):
    keys = {"sample__branching": "per_step", "reward_aggregation": "gdpo"}
    run = running.prepare(arguments(**keys))
    honest, seen = collect.combine, []

    def combine(config, scores, group):
        seen.append(group)
        return honest(config, scores, group)

    monkeypatch.setattr(collect, "combine", combine)
    (rollout,) = epochs(run, 1)
    leaf = rollout.leaf
    expected = torch.stack([rollout.batch.group[leaf], rollout.steps[leaf, 0]], 1)
    pairs = expected.unique(dim=0, return_inverse=True)[1]
    assert len(seen[0].unique()) == 2 * NUM_GROUPS == len(pairs.unique())
    assert (seen[0][:, None] == seen[0]).equal(pairs[:, None] == pairs)


def test_a_reward_is_less_by_its_paths_distance_from_the_reference(arguments):
    keys = {"train__kl_mode": "v", "sample__global_std": False}
    run = running.prepare(arguments(train__reward_kl=1e4, **keys))
    (at_start,) = epochs(run, 1)  # the policy is the reference
    for _, param in running.trained_parameters(run):
        param.data += 0.02 * torch.randn_like(param, generator=None)
    sampled = collect.roll_out(run, 1)
    velocities, rows = sampled.rollout.velocities, sampled.rollout
    scores = collect.score(run, sampled)
    assert sampled.rollout.velocities is None and rows.steps.shape[1] == 2
    expected = torch.zeros(len(rows), dtype=torch.float64)
    with torch.no_grad(), run.snapshots.using("reference"):
        for part in torch.arange(len(rows)).split(BATCH_SIZE):
            some = rows.rows(part)
            for point in run.objective.points(some, None):
                apart = run.predictor(some)(point) - velocities[part][:, point.column]
                expected[part] += (apart.double() ** 2).flatten(1).mean(1) / 2
    assert (expected > 0).all()
    torch.testing.assert_close(torch.from_numpy(scores["reference_kl"]), expected)
    shaped = grouped(torch.from_numpy(scores["avg"]) - 1e4 * expected)
    collect.weigh(run, sampled, scores, 1)
    centred = shaped - shaped.mean(1, keepdim=True)
    normal = centred / (shaped.std(1, correction=0, keepdim=True) + 1e-4)
    found = grouped(sampled.rollout.advantages).double()
    torch.testing.assert_close(found, normal, atol=1e-4, rtol=1e-4)
    plain = running.prepare(arguments(**keys))
    (unshaped,) = epochs(plain, 1)
    assert torch.equal(at_start.advantages, unshaped.advantages)


TREE = {"sample__branching": "tree"}  # of two depths


@pytest.mark.parametrize(
    ("keys", "remedy"),
    [
        ({"train__tree_depths": 1}, "train.tree_depths=0"),
        (TREE | {"train__tree_depths": 3}, "train.tree_depths=0"),
        (TREE | {"train__tree_depths": 1, "objective": "nft"}, "train.tree_depths=0"),
        (TREE | {"train__reward_kl": 0.1}, "config.train.beta"),
    ],
)
def test_depths_and_paths_that_are_not_there_are_refused(files, keys, remedy):
    with pytest.raises(ValueError, match=remedy):
        running.prepare(running.arguments(files, **keys))
    running.prepare(running.arguments(files, **TREE, train__tree_depths=2))
