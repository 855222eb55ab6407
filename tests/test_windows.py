from collections import Counter

import numpy as np
import pytest

from config.base import COMMON
from flow_grpo import keys, windows


def sample_of(num_steps, size, span, fixed):
    sample = keys.build(COMMON).sample
    sample.num_steps, sample.sde_window_size = num_steps, size
    sample.sde_window_range, sample.sde_steps = tuple(span), tuple(fixed)
    return sample


def check(num_steps, size, span, fixed):
    """As preflight does: each key's own range first."""
    config = keys.build(COMMON)
    config.sample = sample_of(num_steps, size, span, fixed)
    keys.check(config, COMMON)
    windows.check(config.sample)


def steps_of(groups, num_steps=10, size=3, span=(0, 5), fixed=(), seed=0, epoch=0):
    return windows.trained_steps(sample_of(num_steps, size, span, fixed), groups, seed, epoch)


def test_size_zero_trains_every_step_but_the_last():
    steps = steps_of(range(3), size=0)
    assert steps.dtype == np.int64
    assert steps.tolist() == [list(range(9))] * 3


def test_fixed_steps_are_those_of_every_group():
    assert steps_of([4, 9], size=0, fixed=(1, 3, 8)).tolist() == [[1, 3, 8]] * 2


@pytest.mark.parametrize(
    "size, span, starts",
    [(3, (0, 5), {0, 1, 2}), (2, (0, 5), {0, 1, 2, 3}), (2, (1, 3), {1}), (4, (5, 9), {5})],
)
def test_starts_cover_the_range_evenly_and_nothing_else(size, span, starts):
    steps = steps_of(range(4000), size=size, span=span)
    assert steps.shape == (4000, size) and steps.dtype == np.int64
    assert (np.diff(steps, axis=1) == 1).all()
    count = Counter(steps[:, 0].tolist())
    assert set(count) == starts
    mean = 4000 / len(starts)
    assert all(abs(n - mean) <= 4 * np.sqrt(mean) for n in count.values())


def test_a_window_depends_on_seed_epoch_and_group_alone():
    steps = steps_of(range(200))
    shuffled = np.random.default_rng(0).permutation(200)
    np.testing.assert_array_equal(steps_of(shuffled), steps[shuffled])
    np.testing.assert_array_equal(steps_of([150]), steps[[150]])
    np.testing.assert_array_equal(steps_of(iter(range(50, 200))), steps[50:])
    assert steps_of([]).shape == (0, 3)
    for other in (steps_of(range(200), seed=1), steps_of(range(200), epoch=1)):
        assert 0.5 < np.mean(steps[:, 0] != other[:, 0]) < 0.8  # 2/3 if independent


def test_windows_are_the_same_for_ever():
    # Other values would break a resume: do not update these.
    assert steps_of(range(8), seed=42, epoch=7)[:, 0].tolist() == [2, 1, 2, 1, 2, 1, 2, 0]


@pytest.mark.parametrize(
    "num_steps, size, span, fixed",
    [
        (10, 0, (0, 5), ()),
        (10, 3, (0, 5), ()),
        (10, 9, (0, 9), ()),
        (2, 0, (0, 0), ()),
        (10, 0, (0, 5), (0, 4, 8)),
        (10, 0, (0, 99), (8,)),
        (10, 2, [7, 9], ()),
        (10, 0, (0, 5), []),
    ],
)
def test_what_can_be_trained_passes_the_check_and_never_holds_the_last_step(
    num_steps, size, span, fixed
):
    check(num_steps, size, span, fixed)
    steps = steps_of(range(50), num_steps, size, span, fixed)
    assert steps.min() >= 0 and steps.max() <= num_steps - 2


@pytest.mark.parametrize(
    "num_steps, size, span, fixed, key, found, remedy",
    [
        (1, 0, (0, 0), (), "num_steps", "1", "at least 2 and at most 1,000"),
        (10, 3, (0, 10), (), "sde_window_range", "(0, 10)", "Set config.sample.sde_window_range"),
        (10, 3, (3, 5), (), "sde_window_range", "(3, 5)", "Set config.sample.sde_window_range"),
        (10, 2, (-1, 5), (), "sde_window_range", "(-1, 5)", "The default is (0, 5)"),
        (6, 6, (0, 5), (), "sde_window_size", "6", "shrink config.sample.sde_window_size"),
        (10, -1, (0, 5), (), "sde_window_size", "-1", "The default is 0"),
        (10, 2, (0,), (), "sde_window_range", "(0,)", "(first, end)"),
        (10, 0, (0, 5), (9,), "sde_steps", "(9,)", "Change config.sample.sde_steps"),
        (10, 0, (0, 5), (-1, 2), "sde_steps", "(-1, 2)", "The default is ()"),
        (10, 0, (0, 5), (2, 2), "sde_steps", "(2, 2)", "Change config.sample.sde_steps"),
        (10, 0, (0, 5), (3, 2), "sde_steps", "(3, 2)", "Change config.sample.sde_steps"),
        (10, 2, (0, 5), (1, 2), "sde_steps", "(1, 2)", "config.sample.sde_window_size to 0"),
    ],
)
def test_an_impossible_window_is_refused_with_key_value_and_remedy(
    num_steps, size, span, fixed, key, found, remedy
):
    with pytest.raises(ValueError) as error:
        check(num_steps, size, span, fixed)
    message = str(error.value)
    assert f"config.sample.{key}={found}" in message
    assert "needed" in message and remedy in message


@pytest.mark.parametrize("num_steps, size", [(10, 3), (6, 5), (4, 3), (28, 9)])
def test_the_suggested_range_passes_the_check(num_steps, size):
    with pytest.raises(ValueError) as error:
        check(num_steps, size, (0, 99), ())
    end = int(str(error.value).split("for example to (0, ")[1].split(")")[0])
    check(num_steps, size, (0, end), ())


def sample_with(**keys_):
    config = keys.build(COMMON)
    config.sample.update({"num_steps": 10, "sde_window_size": 3} | keys_)
    return config.sample


def test_a_subset_holds_distinct_ascending_steps_each_as_often_as_another():
    sample = sample_with(sde_window="subset", sde_window_range=(1, 6), sde_window_size=2)
    steps = windows.trained_steps(sample, range(4000), seed=0, epoch=0)
    assert (np.diff(steps) > 0).all() and steps.min() == 1 and steps.max() == 5
    pairs = Counter(map(tuple, steps.tolist()))
    assert len(pairs) == 10  # 400 of each, standard deviation 19
    assert all(310 < number < 490 for number in pairs.values())


def test_one_stratified_step_a_group_covers_the_range_evenly_every_epoch():
    sample = sample_with(sde_window="stratified", sde_window_range=(2, 8), sde_window_size=1)
    orders = set()
    for epoch in range(5):
        steps = windows.trained_steps(sample, range(18), 0, epoch, num_groups=18)[:, 0]
        assert Counter(steps.tolist()) == {step: 3 for step in range(2, 8)}
        orders.add(tuple(steps.tolist()))
    assert len(orders) == 5
    alone = windows.trained_steps(sample, [7], 0, 3, num_groups=18)
    assert alone.tolist() == [windows.trained_steps(sample, range(18), 0, 3, 18)[7].tolist()]


def starts_at(sample, epochs):
    return [windows.trained_steps(sample, [0], 0, epoch)[0, 0] for epoch in epochs]


def test_a_progressive_window_moves_on_and_rolls_back_as_mixgrpos():
    sample = sample_with(num_steps=25, sde_window="progressive", sde_window_size=4)
    sample.sde_window_range = (0, 24)
    epochs = [0, 24, 25, 50, 499, 500, 525]
    assert starts_at(sample, epochs) == [0, 0, 1, 2, 19, 20, 0]
    sample.window_rolls_back = False
    assert starts_at(sample, [524, 525, 9999]) == [20, 20, 20]
    sample.window_stride = 3
    assert starts_at(sample, [0, 25, 50, 9999]) == [0, 3, 6, 18]
    groups = windows.trained_steps(sample, range(5), 0, 30)
    assert (groups == groups[0]).all()


def test_a_progressive_window_stays_as_long_as_it_is_told():
    sample = sample_with(sde_window="progressive", sde_window_range=(0, 9), window_dwell=4)
    assert starts_at(sample, [0, 3, 4, 8]) == [0, 0, 1, 2]


def test_a_progressive_windows_dwell_falls_as_mixgrpos():
    sample = sample_with(num_steps=28, sde_window="progressive", sde_window_size=4)
    sample.sde_window_range = (0, 27)
    sample.window_decay, sample.window_decay_from = 0.1, 13
    sample.window_rolls_back = False
    dwell = Counter(starts_at(sample, range(14 * 25 + 25 * 9)))
    assert [dwell[b] for b in (1, 13, 14, 20, 22)] == [25, 25, 23, 13, 11]


@pytest.mark.parametrize(
    ("keys_", "found", "remedy"),
    [
        ({"sde_window": "stratified"}, "sde_window_size=3", "sde_window_size to 1"),
        ({"sde_window": "subset", "sde_window_size": 0}, "sde_window='subset'", "=random"),
        ({"branching": "shared_prefix"}, "branching='shared_prefix'", "same_latent=True"),
        ({"branching": "trunk", "noise_level": 0.0}, "branching='trunk'", "A positive number"),
        ({"branching": "per_step"}, "num_image_per_prompt=16", "a multiple of 3"),
        (
            {"branching": "per_step", "num_image_per_prompt": 3},
            "num_image_per_prompt=3",
            "from 6 on",
        ),
        (
            {"branching": "strides", "sde_window_size": 1, "num_image_per_prompt": 5},
            "num_image_per_prompt=5",
            "a multiple of 2",
        ),
        ({"branching": "tree"}, "num_image_per_prompt=16", "8, 27, 64"),
        (
            {"branching": "tree", "num_image_per_prompt": 27},
            "num_image_per_prompt=27",
            "a divisor of 32",
        ),
    ],
)
def test_an_impossible_branching_is_refused_with_key_value_and_remedy(keys_, found, remedy):
    with pytest.raises(ValueError) as error:
        windows.check(sample_with(**keys_))
    assert f"config.sample.{found}" in str(error.value) and remedy in str(error.value)


@pytest.mark.parametrize(
    "keys_",
    [
        {"branching": "shared_prefix", "same_latent": True},
        {"branching": "per_step", "num_image_per_prompt": 24},
        {"branching": "strides", "sde_window_size": 2},
        {"branching": "tree", "num_image_per_prompt": 8},
        {"branching": "tree", "sde_window_size": 2},
        {"sde_window": "stratified", "sde_window_size": 1},
    ],
)
def test_a_possible_one_passes(keys_):
    windows.check(sample_with(**keys_))
