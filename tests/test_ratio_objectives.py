"""GRPO-Guard, Flow-DPPO, and a clip range that is one-sided, in nats or weighed by the step."""

import math

import pytest
import torch
from fixtures import F64, FIXTURE, NOISE_LEVEL, SD3_SIGMAS, V_NEW, V, Z, close
from ratio import fixture, loss_and_gradient, objective, prepared

from config.base import base
from flow_grpo.diffusers_patch.sd3 import SD3
from flow_grpo.objectives.ratio.terms import step_weights
from flow_grpo.objectives.registry import find
from flow_grpo.sampling import Schedule

EXPONENT = [0.0005446875, 0.0007781250]  # mean(z dm) of the worked step, Flow-SDE


def test_the_guards_fixture_has_this_ratio_loss_and_gradient():
    guard = objective(name="grpo_guard", clip_range=2e-6)
    loss, gradient = loss_and_gradient(guard, fixture(), V_NEW)
    close(loss.stats["ratio"].log(), EXPONENT)
    close(loss.stats["ratio"], [1.0005448359, 1.0007784278])
    close(loss.value.detach().mean(), 0.0038821391, atol=1e-8)
    close(gradient[0], 0.0, atol=0)
    close(gradient[1], [-0.0389365357, 0.1168096071, -0.2336192142, 0.3114922857], atol=1e-8)


def test_at_ratio_one_the_guards_gradient_is_this_whatever_the_step():
    advantages = torch.tensor([1.0, -1.0], dtype=F64)
    _, gradient = loss_and_gradient(objective(name="grpo_guard"), fixture("sde"), V)
    close(gradient, advantages[:, None] * (1 + 0.7**2 / 2) * Z / (2 * 4), atol=1e-8)


def test_the_guards_exponent_is_the_log_ratio_without_its_bias_times_the_std():
    truth = FIXTURE["dance"]
    loss, _ = loss_and_gradient(objective("dance", name="grpo_guard"), fixture("dance"), V_NEW)
    expected = [truth["std"] * (ratio + truth["kl"]) for ratio in truth["log_ratio"]]
    close(loss.stats["ratio"].log(), expected)


def test_the_guards_rows_each_have_their_own_bias():
    rows, velocity = fixture(), V_NEW.clone()
    velocity[1] += 1.0  # moves row 1 far: a mean over the batch would change row 0
    (one, _), (two, _) = (
        loss_and_gradient(objective(name="grpo_guard"), rows, v) for v in (V_NEW, velocity)
    )
    seen = [loss.stats["ratio"] for loss in (one, two)]
    assert seen[0][0] == seen[1][0] and seen[0][1] != seen[1][1]


def test_the_guards_exponent_has_mean_zero_wherever_the_policy_goes():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200_000, 4, generator=generator, dtype=F64)
    away = FIXTURE["sde"]["slope"] * (V_NEW - V)[0]
    exponent = (noise * away).mean(1)
    plain = exponent / FIXTURE["sde"]["std"] - FIXTURE["sde"]["kl"]
    error = away.norm() / 4 / math.sqrt(len(noise))
    assert abs(exponent.mean()) < 4 * error
    close(exponent.std(), away.norm() / 4, rtol=0.01)
    assert plain.mean() < 0  # what the bias would do


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("sample.sde_type", "cps", "Set config.sample.sde_type to sde or dance or linear."),
        ("train.step_weight", "std", "Set config.train.step_weight=none."),
    ],
)
def test_what_the_guard_cannot_run_is_refused(key, value, remedy):
    config = base("grpo_guard")
    config.sample.noise_level = 0.7
    find("grpo_guard").check(config, SD3)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=f"config.{key}='{value}'") as error:
        find("grpo_guard").check(config, SD3)
    assert str(error.value).endswith(remedy)


def dppo(threshold, kind="sde", **train):
    found = objective(kind, name="flow_dppo", **train)
    found.threshold = threshold
    return found


@pytest.mark.parametrize(
    ("threshold", "mean", "dropped"),
    [(1e-5, 2.6403332e-4, [0, 0]), (1e-6, 0.5008764808, [1, 0]), (math.inf, 2.6403332e-4, [0, 0])],
)
def test_the_dppo_fixture_has_this_loss_at_each_threshold(threshold, mean, dropped):
    loss, gradient = loss_and_gradient(dppo(threshold), fixture(), V_NEW)
    close(loss.stats["step_kl"], FIXTURE["sde"]["kl"])
    close(loss.value.detach().mean(), mean)
    assert loss.stats["dropped"].tolist() == dropped
    assert ((gradient == 0).all(1) == torch.tensor(dropped, dtype=torch.bool)).all()


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_with_threshold_zero_only_what_leads_back_to_the_old_policy_trains(up, advantage):
    rows = fixture("sde", torch.full((2,), advantage, dtype=F64))
    velocity = V + 0.05 * FIXTURE["sde"]["slope"] * (Z if up else -Z)
    loss, gradient = loss_and_gradient(dppo(0.0), rows, velocity)
    leads_on = up == (advantage > 0)
    assert ((loss.stats["ratio"] > 1) == up).all()
    assert ((gradient == 0) if leads_on else (gradient != 0)).all()
    value = torch.zeros(2, dtype=F64) if leads_on else -advantage * loss.stats["ratio"]
    close(loss.value.detach(), value, atol=1e-15)


@pytest.mark.parametrize("name", ["grpo_guard", "flow_dppo"])
@pytest.mark.parametrize("kind", ["sde", "dance"])
def test_a_replayed_step_has_ratio_one_and_its_own_mean(name, kind):
    replaying, rows = objective(kind, name=name, old_log_prob="replay"), fixture(kind)
    (old,) = prepared(replaying, rows, lambda point: V_NEW)
    close(
        old["old_mean"],
        torch.tensor(FIXTURE[kind]["mean"], dtype=F64) + FIXTURE[kind]["slope"] * (V_NEW - V),
    )
    loss, _ = loss_and_gradient(replaying, rows, V_NEW, old=old)
    assert loss.stats["ratio"].tolist() == [1.0, 1.0]


def test_a_side_of_the_clip_range_may_have_its_own_width():
    truth = FIXTURE["sde"]["log_ratio"]  # both ratios are above 1
    for keys in ({"clip_range_gt": 1e-3, "clip_range": 1e-5}, {"clip_range": 1e-3}):
        loss, _ = loss_and_gradient(objective(**keys), fixture(), V_NEW)
        close(loss.value[0].detach(), -(1 + 1e-3))
        close(loss.value[1].detach(), math.exp(truth[1]))
    loss, _ = loss_and_gradient(objective(clip_range_lt=1e-3, clip_range=1e-5), fixture(), V_NEW)
    close(loss.value[0].detach(), -(1 + 1e-5))
    down = V - (V_NEW - V)
    loss, _ = loss_and_gradient(objective(clip_range_lt=1e-3, clip_range=1e-5), fixture(), down)
    close(loss.value[1].detach(), 1 - 1e-3)


def true_log_ratio(kind):
    """Of the worked step, summed over the elements, in nats."""
    truth = FIXTURE[kind]
    away = truth["slope"] * (V_NEW - V)
    return ((Z * away).sum(1) / truth["std"] - (away**2).sum(1) / (2 * truth["std"] ** 2)).tolist()


@pytest.mark.parametrize("kind", NOISE_LEVEL)
@pytest.mark.parametrize("name", ["grpo", "grpo_guard"])
def test_a_clip_range_in_nats_is_of_the_whole_images_log_ratio(kind, name):
    if name == "grpo_guard" and kind == "cps":
        return
    nats = true_log_ratio(kind)[0]
    for share, is_clipped in ((0.9, 1), (1.1, 0)):
        found = objective(kind, name=name, clip_nats=share * nats)
        loss, _ = loss_and_gradient(found, fixture(kind), V_NEW)
        assert loss.stats["clip_high"][0] == is_clipped, (kind, share)


def test_the_gate_then_measures_nats():
    assert objective(clip_nats=2.0).gate_limits() == {"nats": 0.2}
    limits = objective(clip_range=1e-4, clip_range_lt=1e-5).gate_limits()
    assert limits == {"log_ratio": pytest.approx(1e-6)}
    config = base("flow_dppo")
    config.dppo.threshold = 1e-3
    found = find("flow_dppo")(config, Schedule(torch.linspace(1, 0, 5)))
    assert found.gate_limits() == {"log_ratio": pytest.approx(1e-4)}
    assert dppo(1e-5).gate_limits() == {"log_ratio": pytest.approx(1e-6)}


@pytest.mark.parametrize("kind", NOISE_LEVEL)
def test_slope_weights_take_a_log_probs_slope_in_the_velocity_out(kind):
    sigmas = torch.tensor(SD3_SIGMAS, dtype=F64)
    weights = step_weights("slope", Schedule(sigmas, kind=kind, noise_level=NOISE_LEVEL[kind]))
    expected = []
    for i, (sigma, after) in enumerate(zip(SD3_SIGMAS[:-2], SD3_SIGMAS[1:-1], strict=True)):
        dt, level = sigma - after, NOISE_LEVEL[kind]
        if kind == "cps":
            angle = level * math.pi / 2
            slope = sigma * (1 - after) - after * (1 - sigma) * math.cos(angle)
            std = after * math.sin(angle)
        else:
            guarded = SD3_SIGMAS[1] if i == 0 else sigma
            g = level * math.sqrt(sigma / (1 - guarded)) if kind == "sde" else level
            slope, std = dt * (1 + g**2 * (1 - sigma) / (2 * sigma)), g * math.sqrt(dt)
        expected.append(std / slope)
    close(weights, [9 * each / sum(expected) for each in expected], atol=2e-6)  # fp32
