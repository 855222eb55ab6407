import random
from itertools import product

import numpy as np
import pytest
import torch

from flow_grpo import randomness


def test_seeds_are_the_same_for_ever():
    # From coreutils: printf '0|init' | b2sum -l 64, shifted right by one bit.
    # Other values would change every run and break every resume: do not update these.
    assert randomness.integer_seed(0, "init") == 887852325830748859
    assert randomness.integer_seed(42, "step", 3, 17, 5, 2) == 4758781369734483899
    assert randomness.integer_seed(-1, "größe", 0, 2**40) == 5335655818965615581
    assert randomness.rng(42, "window", 3, 17).getrandbits(32) == 1270060414


def test_seeds_fit_a_torch_generator():
    seeds = [randomness.integer_seed(0, "step", i) for i in range(2000)]
    assert min(seeds) >= 0 and max(seeds) < 2**63
    assert max(seeds) > 0.99 * 2**63  # the whole range is used
    torch.Generator().manual_seed(max(seeds))


def test_a_hundred_thousand_draws_have_a_hundred_thousand_seeds():
    purposes, epochs, groups, members = ("init", "step"), range(10), range(50), range(100)
    names = product(range(1), purposes, epochs, groups, members)
    assert len({randomness.integer_seed(*name) for name in names}) == 100_000


@pytest.mark.parametrize(
    "one, other",
    [
        ((1, "step", 23), (1, "step", 2, 3)),
        ((12, "step", 3), (1, "step", 23)),
        ((1, "step", 2, 3), (1, "step", 3, 2)),
        ((1, "step"), (1, "step", 0)),
        ((1, "step", 1), (1, "step", -1)),
        ((1, "2|step"), (1, "step", 2)),
        ((1, "step2"), (1, "step", 2)),
        ((1, "step"), (1, "window")),
        ((1, "step"), (2, "step")),
    ],
)
def test_no_two_names_share_an_encoding(one, other):
    assert randomness.integer_seed(*one) != randomness.integer_seed(*other)


def test_neighbouring_coordinates_draw_independently():
    uniform = np.array(
        [[randomness.rng(0, "step", e, g).random() for g in range(100)] for e in range(100)]
    )
    assert abs(uniform.mean() - 1 / 2) < 4 / np.sqrt(12 * uniform.size)
    for one, other in ((uniform[1:], uniform[:-1]), (uniform[:, 1:], uniform[:, :-1])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 4 / np.sqrt(one.size)


def test_numpy_and_torch_integers_name_the_same_draw_as_python_ones():
    seed = randomness.integer_seed(7, "step", 3, 1)
    assert randomness.integer_seed(np.int64(7), "step", np.int32(3), True) == seed
    assert randomness.integer_seed(torch.tensor(7), "step", torch.tensor(3), 1) == seed
    with pytest.raises(TypeError):
        randomness.integer_seed(7, "step", 3.0, 1)


def test_the_global_generators_are_neither_read_nor_moved():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    python_state = random.getstate()
    first = randomness.rng(0, "init", 1).random()
    assert randomness.rng(0, "init", 1).random() == first
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert random.getstate() == python_state
