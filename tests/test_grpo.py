"""GRPO's loss on the worked step of fixtures.py, and what it can run."""

import math

import pytest
import torch
from fixtures import F64, FIXTURE, NOISE_LEVEL, SD3_SIGMAS, V_NEW, V, Z, blank_batch, close
from ratio import fixture, loss_and_gradient, objective, prepared

from config.base import base
from flow_grpo.diffusers_patch.flux import Flux
from flow_grpo.diffusers_patch.sd3 import SD3
from flow_grpo.diffusers_patch.zimage import ZImage
from flow_grpo.objectives.ratio.grpo import GRPO
from flow_grpo.objectives.ratio.terms import clipped_surrogate
from flow_grpo.records import Rollout


def test_the_surrogate_of_four_rows_has_these_losses_and_gradients():
    log_ratio = torch.tensor([2e-4, -2e-4, 2e-4, -2e-4], dtype=F64, requires_grad=True)
    advantages = torch.tensor([1.5, 1.5, -0.5, -0.5], dtype=F64)
    value, stats = clipped_surrogate(log_ratio, advantages, 1e-4, 1e-4)
    value.mean().backward()
    close(value.detach(), [-1.50015, -1.4997000300, 0.5001000100, 0.49995])
    close(value.detach().mean(), -0.4999500050)
    close(log_ratio.grad, [0, -0.3749250075, 0.1250250025, 0])
    assert stats["clip_high"].tolist() == [1, 0, 1, 0] and stats["clip_low"].tolist() == [0, 1] * 2
    close(stats["approx_kl"], 2e-8, atol=1e-20)
    close(stats["ratio"], [math.exp(2e-4), math.exp(-2e-4)] * 2, atol=1e-15)


def test_the_fixture_has_these_losses_and_gradients():
    loss, gradient = loss_and_gradient(objective(clip_range=1e-4), fixture(), V_NEW)
    close(loss.value.detach(), [-1.0001, 1.0017529615], atol=3e-10)
    close(loss.value.detach().mean(), 8.264807545e-4, atol=3e-10)
    close(gradient[0], 0.0, atol=0)
    close(gradient[1], [-0.0086053773, 0.0263112666, -0.0528701004, 0.0703284223], atol=3e-10)
    for kind in ("sde", "dance"):
        loss, _ = loss_and_gradient(objective(kind), fixture(kind), V_NEW)
        close(loss.stats["ratio"].log(), FIXTURE[kind]["log_ratio"])


@pytest.mark.parametrize("kind", NOISE_LEVEL)
def test_at_ratio_one_the_gradient_is_minus_the_advantage_times_that_of_the_log_prob(kind):
    advantages = torch.tensor([1.5, -0.5], dtype=F64)
    _, gradient = loss_and_gradient(objective(kind), fixture(kind, advantages), V)
    std = FIXTURE[kind]["std"]
    slope = 2 * std if kind == "cps" else 1 / std  # of the log-prob over the noise
    close(gradient, -advantages[:, None] / 2 * slope * FIXTURE[kind]["slope"] * Z / 4)


@pytest.mark.parametrize("kind", NOISE_LEVEL)
@pytest.mark.parametrize(
    "advantage, up, is_clipped", [(1, 1, True), (1, 0, False), (-1, 1, False), (-1, 0, True)]
)
def test_a_ratio_beyond_the_clip_range_keeps_only_the_gradient_that_leads_back(
    kind, advantage, up, is_clipped
):
    towards_the_sample = FIXTURE[kind]["slope"] * (Z if up else -Z)
    velocity = V + 0.05 * towards_the_sample
    micro = fixture(kind, torch.full((2,), float(advantage), dtype=F64))
    loss, gradient = loss_and_gradient(objective(kind, clip_range=1e-5), micro, velocity)
    beyond = loss.stats["clip_high" if up else "clip_low"]
    assert (beyond == 1).all()
    assert ((gradient == 0) if is_clipped else (gradient != 0)).all()
    limit = 1 + 1e-5 if up else 1 - 1e-5
    expected = torch.full((2,), limit, dtype=F64) if is_clipped else loss.stats["ratio"]
    close(loss.value.detach(), -advantage * expected, atol=1e-15)


def test_a_log_ratio_that_would_overflow_stays_finite():
    micro = fixture()
    micro.log_probs = micro.log_probs - 2000
    loss, gradient = loss_and_gradient(objective(), micro, V_NEW)
    close(loss.stats["ratio"], math.exp(20), rtol=1e-12)
    assert loss.value.isfinite().all() and gradient.isfinite().all()


KL = {
    ("sde", "kl_true"): FIXTURE["sde"]["kl"],
    ("sde", "kl_dt"): 6.1783522003e-07,
    ("sde", "x"): 2.4219140625e-06,
    ("sde", "v"): 1.5625e-04,
    ("dance", "kl_true"): FIXTURE["dance"]["kl"],
    ("dance", "kl_dt"): 8.8769666884e-06,
    ("dance", "x"): 1.5978540039e-06,
    ("cps", "kl_true"): FIXTURE["cps"]["kl"],
    ("cps", "kl_dt"): FIXTURE["cps"]["kl"],  # its std has no factor sqrt(dt) to take out
    ("cps", "x"): 6.0477642864e-06,
    ("cps", "v"): 1.5625e-04,
}


@pytest.mark.parametrize("kind, mode", KL)
def test_the_kl_to_the_reference_has_this_value_and_gradient(kind, mode):
    grpo = objective(kind, beta=0.3, kl_mode=mode)
    micro = fixture(kind, torch.zeros(2, dtype=F64))
    loss, gradient = loss_and_gradient(grpo, micro, V_NEW, reference=V)
    close(loss.stats["kl"], KL[kind, mode], atol=0, rtol=1e-9)
    close(loss.value.detach(), 0.3 * KL[kind, mode], atol=0, rtol=1e-9)
    # Each is a constant times mean((v - v_ref)^2), so its gradient is 2 KL (v - v_ref) / sum of
    # squares; /2 for the mean over rows.
    away = V_NEW - V
    close(gradient, 0.3 * KL[kind, mode] * away / (away**2).sum(1, keepdim=True), rtol=1e-8)


@pytest.mark.parametrize("mode", ["kl_true", "kl_dt", "x", "v"])
@pytest.mark.parametrize("kind", NOISE_LEVEL)
def test_the_kl_is_zero_without_a_gradient_at_the_reference(kind, mode):
    micro = fixture(kind, torch.zeros(2, dtype=F64))
    grpo = objective(kind, beta=1.0, kl_mode=mode)
    loss, gradient = loss_and_gradient(grpo, micro, V_NEW, reference=V_NEW)
    assert (loss.value == 0).all() and (gradient == 0).all()


def test_no_gradient_reaches_the_state_that_a_step_went_to_or_the_statistics():
    micro = fixture()
    micro.next_latents.requires_grad_()
    loss, _ = loss_and_gradient(objective(beta=1.0), micro, V_NEW, reference=V)
    assert micro.next_latents.grad is None
    assert not any(stat.requires_grad for stat in loss.stats.values())


def test_only_a_kl_needs_the_reference():
    assert objective().snapshots == () and objective().freeze([], None) == {}
    asked = []
    with_kl = objective(beta=0.1)
    assert with_kl.snapshots == ("reference",)
    assert with_kl.freeze([], lambda *given: asked.append(given)) == {"reference": None}
    assert asked == [([], "reference")]


def test_std_weights_are_each_steps_std_over_their_mean():
    sigmas = torch.tensor(SD3_SIGMAS, dtype=F64)
    weights = objective(sigmas=sigmas, step_weight="std").step_weights(None)
    published = [1.5766, 1.6733, 1.2075, 1.0043, 0.8824, 0.7946, 0.7186, 0.6351, 0.5076]
    close(weights, published, atol=6e-5)
    guarded = [SD3_SIGMAS[1], *SD3_SIGMAS[1:-2]]
    std = [
        0.7 * math.sqrt(sigma / (1 - safe) * (sigma - after))
        for sigma, safe, after in zip(SD3_SIGMAS[:-2], guarded, SD3_SIGMAS[1:-1], strict=True)
    ]
    assert sum(std) / 9 == pytest.approx(0.4440046737, abs=1e-9)
    close(weights, [9 * s / sum(std) for s in std], atol=1e-6)  # fp32


def test_std_weights_multiply_the_surrogate_and_not_the_kl():
    plain, weighted = objective(beta=0.1), objective(beta=0.1, step_weight="std")
    one, _ = loss_and_gradient(plain, fixture(), V_NEW, reference=V)
    other, _ = loss_and_gradient(weighted, fixture(), V_NEW, reference=V)
    kl = 0.1 * KL["sde", "kl_dt"]
    std = [0.7, 0.7 * math.sqrt(0.9), FIXTURE["sde"]["std"]]  # of the steps 1 -> .9 -> .8 -> .7
    close(other.value.detach() - kl, (one.value.detach() - kl) * 3 * std[2] / sum(std), atol=1e-6)


def random_rollout(steps):
    generator = torch.Generator().manual_seed(0)
    rows, shape = torch.arange(len(steps)), (*steps.shape, 6)
    draw = [torch.randn(shape, generator=generator, dtype=F64) for _ in range(3)]
    micro = Rollout(
        batch=blank_batch(rows, rows),
        steps=steps,
        next_steps=steps + 1,
        latents=draw[0],
        next_latents=draw[0] + 0.1 * draw[1],
        log_probs=torch.zeros(steps.shape, dtype=F64),
        final=draw[0][:, 0],
        leaf=torch.ones(len(steps), dtype=torch.bool),
        parent=torch.full((len(steps), 2), -1),
        advantages=torch.linspace(-1, 1, len(steps), dtype=F64),
    )
    return micro, draw[2]


@pytest.mark.parametrize("kind", NOISE_LEVEL)
def test_rows_at_different_steps_have_the_loss_that_they_have_alone(kind):
    steps = torch.tensor([[0, 2], [1, 2], [0, 1], [2, 3]])
    sigmas = torch.tensor(SD3_SIGMAS, dtype=F64)
    keys = {"beta": 1.0, "kl_mode": "kl_dt", "step_weight": "std", "clip_range": 0.1}
    grpo = objective(kind, sigmas, old_log_prob="replay", **keys)
    micro, velocity = random_rollout(steps)
    old = prepared(grpo, micro, lambda point: velocity[:, point.column])
    for k, point in enumerate(grpo.points(micro, None)):
        on_policy = old[k] | {"reference": velocity[:, k]}
        assert (grpo.loss(velocity[:, k], on_policy, micro, point).stats["ratio"] == 1).all()
    together = [
        grpo.loss(velocity[:, k] * 1.01, old[k] | {"reference": velocity[:, k]}, micro, point).value
        for k, point in enumerate(grpo.points(micro, None))
    ]
    for row in range(4):
        alone = micro.rows(slice(row, row + 1))
        mine = velocity[row : row + 1]
        for k, point in enumerate(grpo.points(alone, None)):
            assert point.sigma.tolist() == [SD3_SIGMAS[steps[row, k]]]
            assert point.step.tolist() == [steps[row, k]] and point.column == k
            known = {"reference": mine[:, k], "old_log_prob": old[k]["old_log_prob"][[row]]}
            value = grpo.loss(mine[:, k] * 1.01, known, alone, point).value
            close(together[k][row : row + 1], value, atol=0, rtol=1e-14)


def test_replay_scores_the_rollout_again_and_rollout_keeps_its_log_probs():
    micro, truth = fixture(), FIXTURE["sde"]
    assert prepared(objective(), micro, lambda point: V_NEW) == [{}]
    close(micro.log_probs[:, 0], truth["log_prob"], atol=0)
    replaying = objective(old_log_prob="replay")
    (old,) = prepared(replaying, micro, lambda point: V_NEW)
    expected = [a + b for a, b in zip(truth["log_prob"], truth["log_ratio"], strict=True)]
    close(old["old_log_prob"], expected)
    close(micro.log_probs[:, 0], truth["log_prob"], atol=0)  # the gate still needs them
    loss, _ = loss_and_gradient(replaying, micro, V_NEW, old=old)
    assert loss.stats["ratio"].tolist() == [1.0, 1.0]


def test_a_run_may_start_with_a_tenth_of_the_clip_range_or_replaying_with_its_tolerance():
    assert objective(clip_range=1e-4).gate_limits() == {"log_ratio": pytest.approx(1e-5)}
    replaying = objective(old_log_prob="replay", gate_tolerance=0.01)
    assert replaying.gate_limits() == {"velocity": 0.01}


@pytest.mark.parametrize(
    "key, value, others, remedy",
    [
        ("train.batch_size", 4, {}, "Set config.train.old_log_prob=replay"),
        ("train.cfg", False, {"sample.guidance_scale": 4.5}, "Set config.train.cfg=True"),
        ("sample.noise_level", 0.0, {}, "A positive number is needed"),
        ("sample.noise_level", 1.2, {"sample.sde_type": "cps"}, "takes values in (0, 1]"),
    ],
)
def test_what_grpo_cannot_run_is_refused_with_key_value_and_remedy(key, value, others, remedy):
    config = base()
    GRPO.check(config, SD3)
    config.update_from_flattened_dict(others | {key: value})
    with pytest.raises(ValueError) as error:
        GRPO.check(config, SD3)
    assert f"config.{key}={value}" in str(error.value) and remedy in str(error.value)


@pytest.mark.parametrize(
    ("family", "scale", "remedy"),
    [
        (SD3, 1.0, None),
        (SD3, 1.5, "config.sample.guidance_scale=1."),
        (ZImage, 0.0, None),
        (ZImage, 1.0, "config.sample.guidance_scale=0."),  # its scale 1 is another model's 2
        (Flux, 1.0, None),
        (Flux, 3.5, None),  # one of the transformer's inputs: no second pass is left out
    ],
)
def test_the_model_says_whether_training_unguided_would_train_another_policy(family, scale, remedy):
    config = base()
    config.train.cfg, config.sample.guidance_scale = False, scale
    if remedy is None:
        GRPO.check(config, family)
        return
    with pytest.raises(ValueError) as error:
        GRPO.check(config, family)
    assert f"config.sample.guidance_scale={scale}" in str(error.value)
    assert str(error.value).endswith(remedy)


@pytest.mark.parametrize(
    "allowed",
    [
        {"train.batch_size": 8, "sample.train_batch_size": 8},
        {"train.batch_size": 4, "train.old_log_prob": "replay"},
        {"train.cfg": False, "sample.guidance_scale": 1.0},
        {"sample.noise_level": 1.2, "sample.sde_type": "sde"},
        {"sample.noise_level": 1.0, "sample.sde_type": "cps"},
    ],
)
def test_what_grpo_can_run_passes_the_check(allowed):
    config = base()
    config.update_from_flattened_dict(allowed)
    GRPO.check(config, SD3)
