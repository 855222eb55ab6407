"""Where final latents are noised: levels, noises, and who has them in common."""

import math

import pytest
import torch
from fixtures import close, shifted
from noised import rollout

from config.base import base
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.objectives.registry import find
from flow_grpo.randomness import Randomness
from flow_grpo.sampling import Schedule

SIGMAS = torch.tensor([1, 0.9, 0.7, 0.4, 0.1, 0])
FORWARD = ("awm", "vgrpo", "epg", "ram", "crd", "dgpo")


def config_of(name, **keys):
    """A config in which levels and noises are drawn for each image, unless keys say otherwise."""
    config = base(name)
    plain = {"levels": "uniform", "levels_of": "image", "noise_of": "image"} | keys
    own = find(name).section
    where = {key: own if key in ("num_times", "steps") else "forward" for key in plain}
    config.update_from_flattened_dict({f"{where[key]}.{key}": plain[key] for key in plain})
    return config


def final(num_rows=100):
    return torch.randn(num_rows, 2, 3, generator=torch.Generator().manual_seed(0))


def points(name="ram", sigmas=SIGMAS, num_rows=100, **keys):
    group, member = [i // 5 for i in range(num_rows)], [i % 5 for i in range(num_rows)]
    rows = rollout(final(num_rows), [0.0] * num_rows, group, member)
    return find(name)(config_of(name, **keys), Schedule(sigmas)).points(rows, Randomness(1, (0, 0)))


@pytest.mark.parametrize(
    "keys",
    [
        {"num_times": 3},
        {"steps": (1, 3)},
        {"num_times": 2, "levels": "stratified", "levels_of": "group", "noise_of": "group"},
        {"num_times": 4, "levels": "distinct", "levels_of": "all", "antithetic": True},
    ],
)
def test_all_losses_take_the_same_draws(keys):
    of_all = [points(name, **keys) for name in ("nft", *FORWARD)]
    for drawn in zip(*of_all, strict=True):
        for other in drawn[1:]:
            assert torch.equal(other.latents, drawn[0].latents)
            assert torch.equal(other.sigma, drawn[0].sigma) and other.column == drawn[0].column


@pytest.mark.parametrize("name", FORWARD)
def test_as_many_noisings_are_drawn_as_asked_for(name):
    assert len(points(name, num_times=2)) == 2
    assert [p.step.unique().tolist() for p in points(name, steps=(0, 2))] == [[0], [2]]


def test_levels_without_replacement_are_distinct_and_come_equally_often():
    drawn = points(num_rows=1000, num_times=4, levels="distinct")
    steps = torch.stack([point.step for point in drawn], dim=1)
    assert (steps.sort(1).values.diff(dim=1) > 0).all()
    for column in steps.T:
        counts = torch.bincount(column, minlength=5)
        assert len(counts) == 5 and ((counts - 200).abs() < 4.5 * math.sqrt(160)).all()
    every = torch.stack([p.step for p in points(num_times=5, levels="distinct")], dim=1)
    assert (every.sort(1).values == torch.arange(5)).all()
    assert torch.equal(torch.stack([p.sigma for p in drawn], 1), SIGMAS[steps])


def test_strata_have_one_level_each_anywhere_in_it():
    drawn = points(num_rows=2000, num_times=4, levels="stratified")
    for k, point in enumerate(drawn):
        place = 4 * (1 - point.sigma.double()) - k  # in the k-th interval from the noise
        assert ((place >= 0) & (place < 1 + 1e-6)).all()
        assert abs(place.mean() - 0.5) < 4.5 / math.sqrt(12 * 2000)
        assert abs(place.std() - 1 / math.sqrt(12)) < 0.01
        below = SIGMAS[point.step], SIGMAS[point.step + 1]
        assert ((point.sigma <= below[0]) & (point.sigma > below[1])).all()
        assert not torch.isin(point.sigma, SIGMAS).any()


def test_a_shift_moves_every_level_by_the_same_formula():
    usual, moved = (
        points(num_times=4, levels="stratified", shift=shift)[2].sigma for shift in (1.0, 3.0)
    )
    close(moved, shifted(usual), atol=1e-6)
    for levels in ("uniform", "logit_normal"):  # to a step of the grid
        usual, moved = (
            points(sigmas=torch.linspace(1, 0, 1001), levels=levels, shift=shift)[0].sigma
            for shift in (1.0, 3.0)
        )
        close(moved, shifted(usual), atol=4e-3)


@pytest.mark.parametrize("levels", ["uniform", "logit_normal", "distinct", "stratified"])
def test_levels_may_be_a_groups_or_everyones(levels):
    (one,), (of_group,), (of_all,) = (
        points(num_times=1, levels=levels, levels_of=of) for of in ("image", "group", "all")
    )
    assert len(one.sigma[:5].unique()) > 1
    by_group = of_group.sigma.reshape(20, 5)
    assert (by_group == by_group[:, :1]).all() and len(by_group[:, 0].unique()) > 1
    assert len(of_all.sigma.unique()) == 1


def test_a_noise_may_be_a_groups():
    (one,), (shared,) = (points(num_times=1, noise_of=of) for of in ("image", "group"))
    assert len(one.noise.flatten(1).unique(dim=0)) == 100
    by_group = shared.noise.reshape(20, 5, 6)
    assert (by_group == by_group[:, :1]).all() and len(by_group[:, 0].unique(dim=0)) == 20
    assert torch.equal(one.sigma, shared.sigma)  # which does not change the levels


@pytest.mark.parametrize("keys", [{"num_times": 2}, {"steps": (0, 3)}])
def test_an_antithetic_pair_has_one_level_and_opposite_noises(keys):
    plain, pairs = points(**keys), points(**keys, antithetic=True)
    assert len(pairs) == 4 and [point.column for point in pairs] == [0, 1, 2, 3]
    for once, (one, other) in zip(plain, (pairs[:2], pairs[2:]), strict=True):
        assert torch.equal(one.latents, once.latents) and torch.equal(one.sigma, other.sigma)
        assert torch.equal(other.noise, -one.noise)
        clean = (1 - one.sigma[:, None, None]) * final()
        close((one.latents + other.latents) / 2, clean, atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_times": 6, "levels": "distinct"}, "config.forward.num_times=6: of config.sample."),
        (
            {"steps": (2, 1)},
            r"config.forward.steps=\(2, 1\): distinct, ascending steps from 0 to 4",
        ),
        ({"steps": (1,), "shift": 3.0}, r"config.forward.shift=3.0 .* config.forward.steps=\(1,\)"),
        ({"levels": "distinct", "shift": 3.0}, "config.forward.levels=distinct draws none"),
    ],
)
def test_levels_that_cant_be_drawn_are_refused(keys, said):
    config = config_of("ram", **keys)
    config.sample.num_steps = 5
    with pytest.raises(ValueError, match=said):
        find("ram").check(config, PatchedPipeline)
    config = config_of("nft", **keys)
    config.sample.num_steps = 5
    with pytest.raises(
        ValueError,
        match=said.replace("forward.num", "nft.num").replace("forward.steps", "nft.steps"),
    ):
        find("nft").check(config, PatchedPipeline)
