"""DPO and SFT: which rows train, with which loss, sampled by which weights."""

import math

import numpy as np
import pytest
import torch
from fixtures import F64, blank_batch, close
from noised import V_OLD, V_REF, V, noised, rollout
from toy import plan_of

from config.base import base
from flow_grpo.diffusers_patch.sd3 import SD3
from flow_grpo.objectives.registry import find
from flow_grpo.randomness import Randomness
from flow_grpo.records import RowTable
from flow_grpo.sampling import Schedule

SIGMAS = torch.tensor([1, 0.9, 0.7, 0.4, 0.1, 0])
ERRORS = {"policy": [0.02535, 0.029], "reference": [0.035625, 0.03375]}  # of the two rows


def objective(name, **keys):
    config = base(name)
    config.sample.num_image_per_prompt = 4
    config.update_from_flattened_dict({key.replace("__", "."): keys[key] for key in keys})
    return find(name)(config, Schedule(SIGMAS))


def loss_and_gradient(found, velocity=V, reference=V_REF, advantages=(1.0, -1.0)):
    """The loss of each row, and the gradient of their mean."""
    velocity = velocity.clone().requires_grad_()
    rows = rollout(advantages=advantages)
    loss = found.loss(velocity, {"reference": reference}, rows, noised())
    loss.value.mean().backward()
    return loss, velocity.grad


def table(group, rank=None):
    group = torch.tensor(group)
    rank = torch.zeros_like(group) if rank is None else torch.tensor(rank)
    return RowTable(
        group=group,
        member=torch.zeros_like(group),
        rank=rank,
        leaf=torch.ones_like(group, dtype=torch.bool),
        parent=torch.full_like(group, -1),
        steps=group.new_zeros(len(group), 0),
        branch=torch.full_like(group, -1),
    )


def trained(arranged):
    """The rows of each micro-batch that have a weight, update by update, rank by rank."""
    return [
        [[micro[micro >= 0].tolist() for micro in of_rank] for of_rank in update]
        for inner in arranged.updates
        for update in inner
    ]


@pytest.mark.parametrize(
    ("beta", "inside", "value"), [(100.0, 0.27625, 0.5645312593), (2000.0, 5.525, 0.0039779462)]
)
def test_the_dpo_fixture_has_this_loss(beta, inside, value):
    loss, _ = loss_and_gradient(objective("dpo", train__beta=beta))
    close(loss.stats["margin"], inside)
    close(loss.value.detach(), value)  # of the pair, at both of its rows
    assert loss.stats["accuracy"].tolist() == [1, 1]


def test_at_the_reference_dpo_is_ln_2_and_its_gradient_a_quarter_of_beta_times_the_errors():
    loss, gradient = loss_and_gradient(objective("dpo"), velocity=V_REF)
    close(loss.value.detach(), math.log(2))
    target = noised().noise - rollout().final
    of_errors = 2 * (V_REF - target) / 4
    close(gradient, 100 / 4 * of_errors * torch.tensor([[1.0], [-1.0]]))


def test_a_swapped_pair_turns_the_margin_and_equal_ones_teach_nothing():
    found = objective("dpo")
    rows, point, order = rollout(), noised(), torch.tensor([1, 0])
    swapped = found.loss(V[order], {"reference": V_REF[order]}, rows.rows(order), point.rows(order))
    close(swapped.stats["margin"], -0.27625)
    twice = torch.tensor([0, 0])
    velocity = V[twice].requires_grad_()
    loss = found.loss(velocity, {"reference": V_REF[twice]}, rows.rows(twice), point.rows(twice))
    loss.value.sum().backward()
    close(velocity.grad.sum(0), 0.0, atol=1e-12)  # as the two move together
    close(loss.value.detach(), math.log(2))


def test_a_pair_is_the_first_best_and_the_first_worst_of_a_group_with_both():
    scores = torch.tensor([0.1, 0.9, 0.9, 0.1, 0.5, 0.5, 0.5, 0.5, math.nan, 0.3, 0.2, math.nan])
    rows = table([0] * 4 + [1] * 4 + [2] * 4)
    arranged = objective("dpo").arrange(scores.double(), rows, plan_of(3, 4, 3), 0)
    pairs = sorted(sum((micro for update in trained(arranged) for micro in update[0]), []))
    assert pairs == [0, 1, 9, 10]
    assert arranged.advantages.nonzero().flatten().tolist() == [0, 1, 9, 10]
    assert arranged.advantages[[1, 0, 9, 10]].tolist() == [1, -1, 1, -1]
    assert arranged.weights.sum() == 4


def test_no_pair_is_split_and_all_ranks_make_equally_many_calls():
    group = [n // 4 for n in range(24)]
    rows = table(group, rank=[n // 12 for n in range(24)])
    scores = torch.arange(24).double()
    scores[12:20] = 1.0  # two groups of the second rank have no pair
    plan = plan_of(6, 4, num_micro_batches=6, num_updates=2, world_size=2)
    arranged = objective("dpo").arrange(scores, rows, plan, 0)
    seen = []
    for update in arranged.updates[0]:
        assert len({tuple(map(len, of_rank)) for of_rank in update}) == 1
        for micro in (micro for of_rank in update for micro in of_rank):
            real = micro[micro >= 0]
            assert (real.reshape(-1, 2)[:, 0] - real.reshape(-1, 2)[:, 1] == 3).all()
            seen += real.tolist()
    assert sorted(seen) == [0, 3, 4, 7, 8, 11, 20, 23]


def test_a_micro_batch_without_a_pair_has_no_loss():
    found, nothing = objective("dpo"), torch.zeros(0, dtype=torch.int64)
    rows, point = rollout().rows(nothing), noised().rows(nothing)
    loss = found.loss(V[nothing], {"reference": V_REF[nothing]}, rows, point)
    assert loss.value.shape == (0,) and all(len(each) == 0 for each in loss.stats.values())


def test_a_pair_is_noised_alike_and_pairs_differ():
    found = objective("dpo", dpo__num_times=3)
    rows = rollout(torch.zeros(4, 6), advantages=(1, -1, 1, -1))
    rows.batch = blank_batch(torch.tensor([0, 0, 1, 1]), torch.tensor([3, 1, 0, 2]))
    for point in found.points(rows, Randomness(0, (0, 0))):
        assert torch.equal(point.noise[0], point.noise[1])
        assert torch.equal(point.noise[2], point.noise[3])
        assert point.sigma[0] == point.sigma[1] and not torch.equal(point.noise[0], point.noise[2])


def test_logit_normal_levels_lie_about_the_middle_of_the_grid():
    found = objective("sft", sft__num_times=1)
    found.schedule = Schedule(torch.linspace(1, 0, 1001))
    rows = rollout(torch.zeros(4000, 1), advantages=(1.0,) * 4000)
    (point,) = found.points(rows, Randomness(0, (0, 0)))
    place = (point.step.double() + 0.5) / 1000
    normal = torch.log(place / (1 - place))
    assert abs(normal.mean()) < 4 / math.sqrt(4000) and abs(normal.std() - 1) < 0.05


@pytest.mark.parametrize("key", ["dpo.density", "sft.density"])
def test_levels_may_be_drawn_evenly(key):
    found = objective(key[:3], **{key.replace(".", "__"): "uniform"})
    found.schedule = Schedule(torch.linspace(1, 0, 1001))
    rows = rollout(torch.zeros(4000, 1), advantages=(1.0,) * 4000)
    rows.batch = blank_batch(torch.arange(4000), torch.zeros(4000, dtype=torch.int64))
    (point,) = found.points(rows, Randomness(0, (0, 0)))
    place = (point.step.double() + 0.5) / 1000  # of standard deviation 1 / sqrt(12)
    assert abs(place.mean() - 0.5) < 4 / math.sqrt(12 * 4000)
    assert abs(place.std() - 1 / math.sqrt(12)) < 0.01


@pytest.mark.parametrize("name", ["dpo", "sft"])
def test_levels_may_be_those_of_fixed_steps_for_every_image(name):
    found = objective(name, **{f"{name}__steps": (0, 2)})
    rows = rollout(torch.zeros(4, 1), advantages=(1.0,) * 4)
    points = found.points(rows, Randomness(0, (0, 0)))
    assert [point.step.tolist() for point in points] == [[0] * 4, [2] * 4]
    config = base(name)
    config[name].steps = (0, config.sample.num_steps)
    with pytest.raises(ValueError, match=f"config.{name}.steps=.* distinct, ascending steps"):
        find(name).check(config, SD3)


@pytest.mark.parametrize(
    ("keys", "found", "remedy"),
    [
        ({"sample.num_image_per_prompt": 5}, "sample.num_image_per_prompt=5", "a divisor of 16"),
        ({"sample.num_image_per_prompt": 1}, "sample.num_image_per_prompt=1", "a divisor of 16"),
        ({"train.batch_size": 3}, "train.batch_size=3", "an even number"),
        (
            {"sample.train_batch_size": 1, "sample.num_batches_per_epoch": 16},
            "sample.train_batch_size=1",
            "Set config.train.batch_size to an even number",
        ),
    ],
)
def test_what_splits_pairs_is_refused(keys, found, remedy):
    config = base("dpo")
    config.sample.train_batch_size = config.sample.num_batches_per_epoch = 4
    config.sample.num_image_per_prompt = 8
    find("dpo").check(config, SD3)
    config.update_from_flattened_dict(keys)
    with pytest.raises(ValueError, match=f"config.{found}") as error:
        find("dpo").check(config, SD3)
    assert remedy in str(error.value)


def test_the_sft_fixture_has_this_loss_with_and_without_the_kl():
    for beta, mean in ((0.0, 0.012675), (0.01, 0.012691125)):
        loss, _ = loss_and_gradient(objective("sft", train__beta=beta), advantages=(1.0, 0.0))
        close(loss.value.detach().mean(), mean)
        close(loss.stats["error"], ERRORS["policy"])


def test_sft_with_one_row_is_flow_matching_of_it():
    loss, gradient = loss_and_gradient(objective("sft"), velocity=V_OLD, advantages=(1.0, 0.0))
    target = noised().noise - rollout().final
    close(loss.value[0].detach(), ((V_OLD - target)[0] ** 2).mean())
    close(gradient[0], (V_OLD - target)[0] / 4)
    assert (gradient[1] == 0).all()


def test_the_best_of_a_group_train_all_ties_and_no_other_row():
    scores = torch.tensor([0.1, 0.9, 0.9, 0.1, math.nan, -0.5, -0.7, math.nan])
    scores = torch.cat([scores, torch.full((4,), math.nan)]).double()
    rows = table([0] * 4 + [1] * 4 + [2] * 4)
    arranged = objective("sft").arrange(scores, rows, plan_of(3, 4, 3), 0)
    assert arranged.weights.nonzero().flatten().tolist() == [1, 2, 5]
    assert arranged.advantages.tolist() == arranged.weights.tolist()
    numbers = np.concatenate([m for u in trained(arranged) for m in u[0]])
    assert sorted(numbers.tolist()) == [1, 2, 5]


def test_rwr_trains_all_scored_rows_by_their_raw_rewards():
    scores = torch.tensor([0.1, -0.9, math.nan, 2.0], dtype=F64)
    found = objective("sft", sft__weights="reward")
    arranged = found.arrange(scores, table([0, 0, 0, 0]), plan_of(1, 4), 0)
    assert arranged.weights.tolist() == [1, 1, 0, 1]
    assert arranged.advantages.tolist() == [0.1, -0.9, 0, 2.0]
    loss, _ = loss_and_gradient(found, advantages=(2.0, -0.5))
    close(loss.value.detach(), [2 * ERRORS["policy"][0], -0.5 * ERRORS["policy"][1]])


@pytest.mark.parametrize(("name", "copy"), [("dpo", "reference"), ("sft", "sampling")])
def test_online_the_weights_that_sample_become_the_policys_every_so_many_steps(name, copy):
    moved = []

    class Moves:
        def update(self, name, decay):
            moved.append((name, decay))

    for every, expected in ((0, 0), (3, 2)):
        found = objective(name, train__ref_update_step=every)
        assert found.samples_with(0, 0) == copy and copy in found.snapshots
        for num_updates in range(1, 8):
            found.after_update(Moves(), num_updates, {})
        assert moved == [(copy, 0.0)] * expected


def test_rows_that_do_not_train_are_not_counted_as_forwards():
    assert objective("dpo", dpo__num_times=3).passes(0) == (3, 3, 0, 0.5, (3, 0))
    assert objective("sft", sft__num_times=2).passes(0) == (2, 0, 0, 0.25, (0, 0))
    assert objective("sft", train__beta=1.0, sft__weights="reward").passes(0) == (
        1,
        1,
        0,
        1.0,
        (1, 0),
    )
