"""Fixture: two final latents of four elements noised to sigma 0.6. Numbers are closed forms."""

import pytest
import torch
from fixtures import F64, close
from noised import SIGMA, TARGET, V_OLD, V_REF, V, noised, rollout

from config.base import base
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.objectives.forward.anchored import old_decay
from flow_grpo.objectives.forward.nft import NFT
from flow_grpo.parallel.plain import Plain
from flow_grpo.randomness import Randomness
from flow_grpo.sampling import Schedule
from flow_grpo.training.snapshots import Snapshots

SIGMAS = torch.tensor([1, 0.9, 0.7, 0.4, 0.1, 0])


def objective(adv_clip_max=5.0, global_std=True, **nft):
    config = base("nft")
    config.nft.update({"kl_beta": 0.0} | nft)
    config.train.adv_clip_max = adv_clip_max
    config.sample.global_std = global_std
    return NFT(config, Schedule(SIGMAS))


def loss_and_gradient(nft, velocity=V, old=V_OLD, advantages=(1.5, -0.5)):
    """The loss of each row, and the gradient of their mean."""
    velocity = velocity.clone().requires_grad_()
    known = {"old": old, "reference": V_REF}
    loss = nft.loss(velocity, known, rollout(advantages=advantages), noised())
    loss.value.mean().backward()
    return loss.value.detach(), velocity.grad


@pytest.mark.parametrize(
    "beta, expected, mean",
    [
        (1.0, [0.6216637931, 0.6040208333], 0.6128423132),
        (0.1, [6.5037937277, 5.7870638949], 6.1454288113),
    ],
)
def test_the_fixture_has_these_losses(beta, expected, mean):
    value, _ = loss_and_gradient(objective(beta=beta))
    close(value, expected)
    close(value.mean(), mean)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_on_policy_the_fixture_has_this_loss_and_gradient(beta):
    value, gradient = loss_and_gradient(objective(beta=beta), velocity=V_OLD)
    close(value, [0.6545070423 / beta, 0.5779411765 / beta])
    expected = [
        [0.1521126761, -0.2661971831, 0.1014084507, 0.3802816901],
        [0.0397058824, -0.0970588235, -0.0573529412, 0.1058823529],
    ]
    close(gradient, expected)


@pytest.mark.parametrize("beta", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("advantages", [(1.5, -0.5), (0.0, 3.0), (-5.0, 5.0)])
def test_on_policy_the_gradient_is_the_advantage_times_that_of_the_adaptive_loss(beta, advantages):
    _, gradient = loss_and_gradient(objective(beta=beta), V_OLD, advantages=advantages)
    error = V_OLD - TARGET  # the gradient of sigma mean(error^2) / mean(abs(error))
    adaptive = 2 * SIGMA * error / (4 * error.abs().mean(1, keepdim=True))
    close(gradient, torch.tensor(advantages, dtype=F64)[:, None] / 2 * adaptive)


def test_on_policy_the_loss_does_not_depend_on_the_advantage():
    values = [
        loss_and_gradient(objective(), V_OLD, advantages=(a, a))[0] for a in (-7, -1, 0, 2.5, 9)
    ]
    for value in values[1:]:
        close(value, values[0], atol=1e-15)


def test_optimality_runs_from_zero_to_one_within_the_clipped_advantages():
    at = {a: loss_and_gradient(objective(), advantages=(a, a))[0] for a in (-7, -5, -1, 0, 2.5, 9)}
    at[5] = loss_and_gradient(objective(), advantages=(5, 5))[0]
    worst, best = at[-5], at[5]
    close(best, [5 * 0.1048965517, 5 * 0.10875])
    close(worst, [5 * 0.1604285714, 5 * 0.1306666667])
    for advantage, quality in ((-7, 0), (-1, 0.4), (0, 0.5), (2.5, 0.75), (9, 1)):
        close((at[advantage] - worst) / (best - worst), quality, atol=1e-12)


def test_the_loss_does_not_depend_on_where_the_advantages_are_clipped_at_one_optimality():
    one, _ = loss_and_gradient(objective(adv_clip_max=5.0))
    other, _ = loss_and_gradient(objective(adv_clip_max=1.0), advantages=(0.3, -0.1))
    close(one / 5, other, atol=1e-14)


def test_the_kl_is_the_squared_distance_of_velocities():
    plain, pull = loss_and_gradient(objective())
    value, gradient = loss_and_gradient(objective(kl_beta=0.2))
    close(value - plain, [0.2 * 0.001975, 0.2 * 0.00125])
    close(gradient - pull, 0.2 * 2 * (V - V_REF) / 4 / 2)


def test_only_a_kl_needs_the_reference():
    assert objective().snapshots == ("old",)
    assert objective(kl_beta=0.1).snapshots == ("old", "reference")
    known = objective(kl_beta=0.1).freeze([], lambda micros, weights: weights)
    assert known == {"old": "old", "reference": "reference"}


def test_a_perfect_prediction_has_loss_and_gradient_zero():
    value, gradient = loss_and_gradient(objective(), velocity=TARGET, old=TARGET)
    close(value, 0.0, atol=1e-15)
    close(gradient, 0.0, atol=1e-9)


def test_the_old_policy_keeps_this_share_after_n_updates():
    assert [old_decay("on_policy", n) for n in (0, 80, 9999)] == [0, 0, 0]
    half = [old_decay("half", n) for n in (0, 1, 250, 500, 501)]
    assert half == pytest.approx([0, 0.001, 0.25, 0.5, 0.5])
    slow = [old_decay("slow", n) for n in (0, 74, 75, 76, 100, 200, 209, 9999)]
    assert slow == pytest.approx([0, 0, 0, 0.0075, 0.1875, 0.9375, 0.999, 0.999])


@pytest.mark.parametrize("decay, num_updates, kept", [("on_policy", 300, 0), ("half", 300, 0.3)])
def test_an_epoch_moves_the_old_policy_towards_the_policy(decay, num_updates, kept):
    layer = torch.nn.Linear(3, 2)
    engine = Plain("no", cpu=True)
    engine.wrap(layer, torch.optim.SGD(layer.parameters()), max_grad_norm=0)
    snapshots = Snapshots(engine, ("old",), use_lora=False)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += 1
    objective(decay=decay).after_update(snapshots, num_updates, {})
    with snapshots.using("old"):
        assert torch.equal(layer.weight, before)
    objective(decay=decay).after_epoch(snapshots, num_updates)
    with snapshots.using("old"):
        old = layer.weight.detach().clone()
    close(old, kept * before + (1 - kept) * (before + 1), atol=1e-6)


def test_targets_are_clamped_group_advantages_and_a_missing_score_weighs_nothing():
    scores = torch.tensor([0, 1, 0, 0, float("nan")], dtype=F64)
    group = torch.zeros(5, dtype=torch.int64)
    advantages, weights = objective(adv_clip_max=1.5, global_std=False).targets(scores, group)
    close(advantages, [-0.5772169666, 1.5, -0.5772169666, -0.5772169666, 0])
    assert weights.tolist() == [1, 1, 1, 1, 0]


def many(num_rows=500):
    generator = torch.Generator().manual_seed(0)
    final = torch.randn(num_rows, 2, 3, generator=generator)
    group, member = [i // 5 for i in range(num_rows)], [i % 5 for i in range(num_rows)]
    return rollout(final, [0.0] * num_rows, group, member)


def test_points_lie_between_the_final_latents_and_the_noise_they_carry():
    nft, micro = objective(num_times=2), many()
    for k, point in enumerate(nft.points(micro, Randomness(1, (0, 0)))):
        sigma = point.sigma[:, None, None]
        close(point.latents, (1 - sigma) * micro.final + sigma * point.noise, atol=1e-6)
        assert torch.equal(point.sigma, SIGMAS[point.step]) and point.column == k
        assert abs(point.noise.mean()) < 4 / 3000**0.5 and abs(point.noise.std() - 1) < 0.06


def test_noise_levels_are_drawn_evenly_from_the_rollouts_grid_without_its_end():
    points = objective(num_times=4).points(many(), Randomness(1, (0, 0)))
    counts = torch.bincount(torch.cat([point.step for point in points]), minlength=6)
    assert counts[5] == 0  # sigma 0 has no noise to predict
    assert ((counts[:5] - 400).abs() < 4 * 400**0.5).all()


def test_fixed_steps_give_every_picture_the_same_noise_levels():
    nft, micro = objective(steps=(1, 3), num_times=7), many()
    points = nft.points(micro, Randomness(1, (0, 0)))
    assert [point.step.unique().tolist() for point in points] == [[1], [3]]
    for point in points:
        assert torch.equal(point.sigma, SIGMAS[point.step])
        wide = point.sigma[:, None, None]
        close(point.latents, (1 - wide) * micro.final + wide * point.noise, atol=1e-6)
    assert not torch.equal(points[0].noise, points[1].noise)


def test_a_noising_depends_on_epoch_pass_group_member_and_time_alone():
    nft, micro = objective(num_times=2), many(20)
    points = nft.points(micro, Randomness(1, (3, 1)))
    half = nft.points(micro.rows(slice(10, 20)), Randomness(1, (3, 1)))
    for point, again in zip(points, half, strict=True):
        assert torch.equal(point.latents[10:], again.latents)
        assert torch.equal(point.sigma[10:], again.sigma)
    noises = [p.noise for p in points]
    for randomness in (Randomness(1, (4, 1)), Randomness(1, (3, 2)), Randomness(2, (3, 1))):
        noises += [p.noise for p in nft.points(micro, randomness)]
    first = torch.cat(noises)[:, 0, 0]
    assert len(first.unique()) == 20 * 2 * 4


@pytest.mark.parametrize("steps", [(1, 0), (2, 2), (4, 10)])
def test_impossible_noise_levels_are_refused(steps):
    config = base("nft")
    config.nft.steps = (0, 9)
    NFT.check(config, PatchedPipeline)
    config.nft.steps = steps
    with pytest.raises(ValueError, match="config.nft.steps=.* from 0 to 9 are needed, as config.s"):
        NFT.check(config, PatchedPipeline)
