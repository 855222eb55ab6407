"""A rollout can be scored again bit for bit, and its noise is a function of names alone."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from fixtures import NOISE_LEVEL, sample
from tiny import LENGTH, prompt_batch

from flow_grpo.conditioning import collate
from flow_grpo.randomness import Randomness
from flow_grpo.records import Guidance, Size
from flow_grpo.sampling import Schedule, replay

SIZE = Size(48, 64)
NUM_STEPS = 6
TEXTS = ("a red apple", "a green cube", "two blue cats")
DRAW = Randomness(seed=42, coordinates=(5,))
OWNERS = [(group, member) for group in range(3) for member in range(2)]
STEPS = {  # of each group
    "windows": np.array([[0, 1], [3, 4], [1, 2]]),
    "full": np.tile(np.arange(NUM_STEPS - 1), (3, 1)),
}


@pytest.fixture(scope="module")
def models():
    models = {name: tiny.patched(name) for name in tiny.MODELS}
    for model in models.values():
        model.transformer.requires_grad_(True)
    return models


def batch_of(model, name, guidance, owners=OWNERS):
    references = [tiny.pictures(name, g) for g in range(3)]
    return prompt_batch(model, SIZE, TEXTS, references, Guidance(guidance), owners)


def schedule_of(model, kind, same_latent=False):
    return Schedule(model.sigmas(NUM_STEPS, SIZE), kind, NOISE_LEVEL[kind], same_latent, LENGTH)


def log_ratios(model, schedule, rollout):
    """Score each trained step again, with gradients, (N, K)."""
    conditioning = collate(model, rollout.batch, LENGTH)
    ratios = []
    for k, steps in enumerate(rollout.steps.unbind(1)):
        point = rollout.latents[:, k], schedule.sigmas[steps]
        velocity = model.velocity(model.transformer, *point, conditioning)
        log_prob = replay(schedule, rollout, k, velocity).log_prob
        assert log_prob.requires_grad
        ratios.append(log_prob.detach() - rollout.log_probs[:, k])
    return torch.stack(ratios, dim=1)


@pytest.mark.parametrize("steps", list(STEPS))
@pytest.mark.parametrize("kind", list(NOISE_LEVEL))
@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        ("sd3", 4.5),
        ("sd3", 1.0),
        ("flux", 3.5),
        ("flux_kontext", 2.5),
        ("flux2_klein", 4.0),
        ("flux2_klein_edit", 1.0),
        ("qwenimage", 4.0),
        ("qwenimage_edit_2511", 4.0),
        ("wan", 4.5),
        ("zimage", 4.0),
        ("zimage_turbo", 0.0),
    ],
)
def test_replaying_a_rollout_gives_log_ratio_zero(models, name, guidance, kind, steps):
    model = models[name]
    batch, schedule = batch_of(model, name, guidance), schedule_of(model, kind)
    trained = STEPS[steps][batch.group.numpy()]
    rollout = sample(model, model.transformer, batch, schedule, DRAW, steps=trained)
    assert rollout.steps.tolist() == trained.tolist()
    assert rollout.log_probs.isfinite().all()
    assert torch.equal(rollout.next_latents[:, :-1], rollout.latents[:, 1:])
    assert (log_ratios(model, schedule, rollout) == 0).all()
    rounded = replace(rollout, next_latents=rollout.next_latents.bfloat16().float())
    assert (log_ratios(model, schedule, rounded) != 0).all(), "the test can't tell a rounded latent"


@pytest.mark.parametrize("kind", list(NOISE_LEVEL))
def test_what_is_kept_does_not_change_the_rollout(models, kind):
    model = models["sd3"]
    batch, schedule = batch_of(model, "sd3", 1.0), schedule_of(model, kind)
    steps = STEPS["windows"][batch.group.numpy()]
    kept, final = (
        sample(model, model.transformer, batch, schedule, DRAW, steps, keep_steps=keep)
        for keep in (True, False)
    )
    assert torch.equal(kept.final, final.final)
    assert final.latents.shape[1] == final.log_probs.shape[1] == final.steps.shape[1] == 0


@pytest.mark.parametrize("kind", list(NOISE_LEVEL))
@pytest.mark.parametrize("name", ["sd3", "flux", "flux_kontext"])
def test_stochastic_steps_of_noise_level_zero_are_ode_steps(models, name, kind):
    model = models[name]
    batch, schedule = batch_of(model, name, 1.0), schedule_of(model, kind)
    steps = STEPS["windows"][batch.group.numpy()]
    finals = [
        sample(model, model.transformer, batch, replace(schedule, **change), DRAW, steps).final
        for change in ({"noise_level": 0.0}, {"kind": "ode"}, {})
    ]
    assert torch.equal(finals[0], finals[1])
    assert not torch.equal(finals[0], finals[2])


def still(hidden_states, **_):
    """Predict velocity 0 for all, so that a rollout is its noise."""
    return (torch.zeros_like(hidden_states),)


def noises(model, name, kind, owners, randomness=DRAW, same_latent=False):
    """Return the initial and final latents of each owner where nothing but noise moves them."""
    batch = batch_of(model, name, 1.0, owners)
    steps = STEPS["full"][batch.group.numpy()]
    rollout = sample(model, still, batch, schedule_of(model, kind, same_latent), randomness, steps)
    ends = zip(rollout.latents[:, 0], rollout.final, strict=True)
    return dict(zip(owners, ends, strict=True))


@pytest.mark.parametrize("kind", list(NOISE_LEVEL))
@pytest.mark.parametrize("name", ["sd3", "flux_kontext"])
def test_a_rows_noise_does_not_depend_on_its_batch(models, name, kind):
    model = models[name]
    together = noises(model, name, kind, OWNERS)
    reversed_rows = noises(model, name, kind, OWNERS[::-1])
    split = {}
    for part in (OWNERS[:1], OWNERS[1:5], OWNERS[5:]):
        split |= noises(model, name, kind, part)
    for owner, (initial, final) in together.items():
        for other in (reversed_rows, split):
            assert torch.equal(initial, other[owner][0])
            assert torch.equal(final, other[owner][1])


@pytest.mark.parametrize(
    "randomness", [Randomness(43, (5,)), Randomness(42, (6,))], ids=["seed", "epoch"]
)
def test_another_seed_or_epoch_gives_other_noise(models, randomness):
    one, other = (noises(models["sd3"], "sd3", "sde", OWNERS, d) for d in (DRAW, randomness))
    for owner in OWNERS:
        assert correlation(one[owner][0], other[owner][0]) < 0.3
        assert correlation(one[owner][1], other[owner][1]) < 0.3


def correlation(a, b) -> float:
    """384 independent numbers give 0 +- 0.05."""
    return abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item())


@pytest.mark.parametrize("name", ["sd3", "flux_kontext"])
def test_rows_share_the_initial_noise_of_their_group_only_with_same_latent(models, name):
    free = noises(models[name], name, "sde", OWNERS)
    shared = noises(models[name], name, "sde", OWNERS, same_latent=True)
    for row in OWNERS:
        for other in OWNERS:
            if row == other:
                continue
            assert correlation(free[row][0], free[other][0]) < 0.3
            if row[0] == other[0]:
                assert torch.equal(shared[row][0], shared[other][0])
                assert not torch.equal(shared[row][1], shared[other][1])
            else:
                assert correlation(shared[row][0], shared[other][0]) < 0.3
