from collections import Counter

import numpy as np
import pytest

from config.base import COMMON
from flow_grpo import keys, rollouts


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
    rollouts.check(config.sample)


def steps_of(groups, num_steps=10, size=3, span=(0, 5), fixed=(), seed=0, epoch=0):
    return rollouts.trained_steps(sample_of(num_steps, size, span, fixed), groups, seed, epoch)


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
