import math

import pytest
import torch

from config.base import base
from flow_grpo.advantages import gdpo_advantages, group_advantages, zero_std_fraction
from flow_grpo.objectives.ratio.grpo import GRPO
from flow_grpo.sampling import Schedule

NAN = math.nan
SCORES = torch.tensor([0.2, 0.4, 0.9, 0.5, 0.3, 0.3, 0.3, 0.3, 0, 1, 0, 0], dtype=torch.float64)
GROUP = torch.tensor([7] * 4 + [3] * 4 + [2**40] * 4)
# Their advantages, by which standard deviation they are divided
GROUP_STD = [-1.1762354533, -0.3920784844, 1.5683139378, 0] + [0] * 4
GROUP_STD += [-0.5772169666, 1.7316508999, -0.5772169666, -0.5772169666]
GLOBAL_STD = [-0.9687744813, -0.3229248271, 1.2916993084, 0] + [0] * 4
GLOBAL_STD += [-0.8073120678, 2.4219362033, -0.8073120678, -0.8073120678]
TOTAL = {
    "a": torch.tensor([0.2, 0.4, 0.9, 0.5, 0, 1, 0, 0], dtype=torch.float64),
    "b": torch.tensor([21, 22.5, 20, 22.5, 20.5, 20.5, 23, 20], dtype=torch.float64),
}
WEIGHTS = {"a": 1.0, "b": 0.5}
PAIR = torch.tensor([0] * 4 + [1] * 4)


def close(actual, expected, atol=1e-9):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def random_scores(num_groups=30, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_groups, size, generator=generator, dtype=torch.float64)
    scores = scores * 3 + torch.arange(num_groups)[:, None]
    return scores.flatten(), torch.arange(num_groups).repeat_interleave(size)


@pytest.mark.parametrize(
    "std, first, last",
    [
        ("group", GROUP_STD[:4], GROUP_STD[8:10]),
        ("global", GLOBAL_STD[:4], GLOBAL_STD[8:10]),
        ("none", [-0.3, -0.1, 0.4, 0], [-0.25, 0.75]),
    ],
)
def test_three_groups_of_four_have_these_advantages(std, first, last):
    advantages = group_advantages(SCORES, GROUP, std=std)
    expected = first + [0] * 4 + [last[0], last[1], last[0], last[0]]
    close(advantages, expected, atol=2e-10)


def test_global_std_is_the_default_and_taken_over_the_raw_scores():
    advantages = group_advantages(SCORES, GROUP)
    assert torch.equal(advantages, group_advantages(SCORES, GROUP, std="global"))
    close(-0.3 / advantages[0] - 1e-4, 0.3095695937)


@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_every_group_sums_to_zero(std):
    advantages = group_advantages(*random_scores(), std=std)
    close(advantages.view(30, 8).sum(1), torch.zeros(30))


def test_the_squares_of_a_group_sum_to_its_size_up_to_epsilon():
    scores, group = random_scores()
    std = scores.view(30, 8).numpy().std(axis=1)
    squares = (group_advantages(scores, group, std="group") ** 2).view(30, 8).sum(1)
    close(squares, 8 * (std / (std + 1e-4)) ** 2)


@pytest.mark.parametrize("std", ["group", "global"])
def test_a_positive_affine_map_of_the_scores_changes_nothing(std):
    scores, group = random_scores()
    expected = group_advantages(scores, group, std=std, epsilon=0)
    close(group_advantages(100 * scores - 7, group, std=std, epsilon=0), expected)
    close(group_advantages(-scores, group, std=std, epsilon=0), -expected)


@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_the_order_of_the_rows_changes_no_bit(std):
    scores, group = random_scores()
    scores = scores.exp()  # sums of unlike magnitudes round differently in another order
    scores[::11] = NAN
    advantages = group_advantages(scores, group, std=std)
    both = {"a": scores, "b": scores.flip(0) ** 2}
    combined = gdpo_advantages(both, WEIGHTS, group)
    for seed in range(20):
        order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
        shuffled = group_advantages(scores[order], group[order], std=std)
        assert torch.equal(shuffled, advantages[order])
        shuffled = {name: values[order] for name, values in both.items()}
        assert torch.equal(gdpo_advantages(shuffled, WEIGHTS, group[order]), combined[order])


@pytest.mark.parametrize("std", ["group", "global", "none"])
@pytest.mark.parametrize("epsilon", [1e-4, 1e-8])
def test_a_constant_group_is_exactly_zero(std, epsilon):
    scores = torch.tensor([0.1] * 12 + [0.2, 0.7])  # fp32 arithmetic gives the first 12 -0.58
    group = torch.tensor([0] * 12 + [1] * 2)
    advantages = group_advantages(scores, group, std=std, epsilon=epsilon)
    assert advantages.dtype == torch.float64
    assert (advantages[:12] == 0).all() and (advantages[12:] != 0).all()
    assert (gdpo_advantages({"a": scores}, {"a": 1.0}, group)[:12] == 0).all()
    assert (group_advantages(scores[:12], group[:12], std=std, epsilon=epsilon) == 0).all()


@pytest.mark.parametrize("scale, constant", [(1, 0.9e-8), (1e3, 0.9e-5), (1e-3, 0.9e-8)])
def test_constant_means_to_1e_8_of_the_mean_or_of_one(scale, constant):
    group = torch.tensor([0, 0, 1, 1])
    for spread, is_zero in ((constant, True), (1.3 * constant, False)):
        scores = torch.tensor([scale, scale + spread, 0, scale], dtype=torch.float64)
        advantages = group_advantages(scores, group, std="none")
        assert ((advantages[:2] == 0).all()) == is_zero
        assert zero_std_fraction(scores, group) == is_zero / 2


@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_a_missing_score_is_as_if_its_row_were_not_there(std):
    scores, group = random_scores()
    scores[[0, 3, 17, 100]] = NAN
    scores[24:32] = NAN  # a whole group
    present = ~scores.isnan()
    advantages = group_advantages(scores, group, std=std)
    assert (advantages[~present] == 0).all()
    close(advantages[present], group_advantages(scores[present], group[present], std=std), 1e-12)
    other = {"a": scores, "b": scores.nan_to_num() ** 2}
    combined = gdpo_advantages(other, WEIGHTS, group)
    assert (combined[~present] == 0).all()
    kept = {name: values[present] for name, values in other.items()}
    close(combined[present], gdpo_advantages(kept, WEIGHTS, group[present]), 1e-12)


def test_scores_that_are_all_missing_give_zeros():
    scores, group = torch.full((6,), NAN), torch.tensor([0, 0, 0, 1, 1, 1])
    assert group_advantages(scores, group).tolist() == [0] * 6
    assert gdpo_advantages({"a": scores}, {"a": 1.0}, group).tolist() == [0] * 6
    assert zero_std_fraction(scores, group) == 1


def test_an_infinite_score_is_never_averaged():
    with pytest.raises(AssertionError, match="infinite"):
        group_advantages(torch.tensor([1, math.inf]), torch.tensor([0, 0]))


@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_the_only_row_of_a_group_has_no_baseline_and_gets_zero(std):
    scores = torch.tensor([0.2, 5.0, 0.4, 0.1, NAN])
    group = torch.tensor([0, 1, 0, 2, 2])  # the last group has one score left
    assert group_advantages(scores, group, std=std)[[1, 3, 4]].tolist() == [0, 0, 0]
    # Not even if all groups are left with one: they had a baseline, it failed.
    scores, group = torch.tensor([0.2, NAN, 0.9, NAN]), torch.tensor([0, 0, 1, 1])
    assert group_advantages(scores, group, std=std).tolist() == [0] * 4


@pytest.mark.parametrize("std", ["group", "global"])
def test_groups_of_one_are_normalised_over_the_batch(std):
    scores = torch.tensor([1.0, 2.0, NAN, 6.0], dtype=torch.float64)
    advantages = group_advantages(scores, torch.tensor([5, 9, 2, 4]), std=std)
    z_score = (torch.tensor([-2, -1, 0, 3])) / (math.sqrt(14 / 3) + 1e-4)
    close(advantages, z_score.double(), atol=1e-6)
    assert advantages[2] == 0
    assert zero_std_fraction(scores, torch.tensor([5, 9, 2, 4])) == 0
    assert zero_std_fraction(torch.ones(4), torch.tensor([5, 9, 2, 4])) == 1


def test_zero_std_fraction_counts_the_groups_without_a_signal():
    assert zero_std_fraction(SCORES, GROUP) == 1 / 3
    assert zero_std_fraction(SCORES.float(), GROUP) == 1 / 3
    missing = torch.tensor([0.2, NAN, NAN, NAN, 0.3, 0.3, NAN, 0.4, NAN, NAN, NAN, NAN])
    assert zero_std_fraction(missing, GROUP) == 2 / 3


def test_gdpo_gives_these_numbers():
    advantages = gdpo_advantages(TOTAL, WEIGHTS, PAIR)
    expected = [-1.5119316952, 0.0847515673, 0.9225554430, 0.5046246849]
    expected += [-0.8462615957, 1.6258843835, 0.2948639087, -1.0744866966]
    close(advantages, expected, atol=2e-10)


def test_a_weighted_sum_lets_the_larger_scale_win():
    total = TOTAL["a"] + 0.5 * TOTAL["b"]
    expected = [-1.2037864414, 0.8754810483, -0.7660459172, 1.0943513103]
    expected += [-0.7844645406, 0.7844645406, 1.1766968108, -1.1766968108]
    close(group_advantages(total, PAIR, std="group", epsilon=0), expected, atol=2e-10)


def test_gdpo_groups_sum_to_zero_with_batch_std_one_whatever_the_scales():
    advantages = gdpo_advantages(TOTAL, WEIGHTS, PAIR)
    close(advantages.view(2, 4).sum(1), torch.zeros(2))
    close(advantages.square().mean(), 1.0)
    scaled = {"a": TOTAL["a"] * 100, "b": TOTAL["b"] - 50}
    close(gdpo_advantages(scaled, WEIGHTS, PAIR), advantages)


def test_gdpo_adds_only_the_weighted_rewards_in_any_order():
    advantages = gdpo_advantages(TOTAL, WEIGHTS, PAIR)
    logged = {"z": torch.full((8,), NAN), **TOTAL}
    assert torch.equal(gdpo_advantages(logged, WEIGHTS, PAIR), advantages)
    assert torch.equal(gdpo_advantages(TOTAL, {"b": 0.5, "a": 1.0}, PAIR), advantages)
    names = ("a", "b", "c")
    scores = {name: random_scores(seed=seed)[0] for seed, name in enumerate(names)}
    group = random_scores()[1]
    weights = dict.fromkeys(names, 0.1)
    backwards = dict(reversed(weights.items()))
    expected = gdpo_advantages(scores, weights, group)
    assert torch.equal(gdpo_advantages(scores, backwards, group), expected)
    one = gdpo_advantages(TOTAL, {"b": 3.0}, PAIR)
    close(one, group_advantages(TOTAL["b"], PAIR, std="group", epsilon=0), atol=1e-9)


# GRPO's targets


def targets(scores, group, **keys):
    config = base()
    config.update_from_flattened_dict({key.replace("__", "."): keys[key] for key in keys})
    return GRPO(config, Schedule(torch.linspace(1, 0, 5))).targets(scores, group)


@pytest.mark.parametrize("global_std, expected", [(True, GLOBAL_STD), (False, GROUP_STD)])
@pytest.mark.parametrize("limit", [5.0, 1.0])
def test_targets_are_clamped_group_advantages(global_std, expected, limit):
    keys = {"train__adv_clip_max": limit, "sample__global_std": global_std}
    advantages, weights = targets(SCORES, GROUP, **keys)
    close(advantages, [max(-limit, min(limit, a)) for a in expected])
    assert advantages.dtype == weights.dtype == torch.float64 and (weights == 1).all()


def test_a_missing_score_has_weight_and_advantage_zero_and_leaves_its_group():
    scores = torch.tensor([0.2, NAN, 0.4, 0.9, 0.5], dtype=torch.float64)
    group = torch.zeros(5, dtype=torch.int64)
    advantages, weights = targets(scores, group, sample__global_std=False)
    assert weights.tolist() == [1, 0, 1, 1, 1] and advantages[1] == 0
    close(advantages[[0, 2, 3, 4]], GROUP_STD[:4])


def test_an_unbiased_std_divides_by_one_less():
    scores = torch.tensor([0.2, 0.4, 0.9, 0.5], dtype=torch.float64)
    group = torch.zeros(4, dtype=torch.int64)
    found = group_advantages(scores, group, std="group", epsilon=0.0, unbiased=True)
    close(found, (scores - 0.5) / math.sqrt(0.26 / 3), atol=1e-12)
    both = torch.cat([scores, scores + 1])
    found = group_advantages(both, torch.arange(8) // 4, std="global", epsilon=0.0, unbiased=True)
    close(found, torch.cat([scores - 0.5, scores - 0.5]) / both.std(), atol=1e-12)


def test_without_a_std_an_advantage_is_the_distance_from_the_mean():
    scores = torch.tensor([0.2, 0.4, 0.9, 0.5, 3.0, 3.0, 3.0, 3.0], dtype=torch.float64)
    found = group_advantages(scores, torch.arange(8) // 4, std="none", unbiased=True)
    close(found, [-0.3, -0.1, 0.4, 0, 0, 0, 0, 0], atol=1e-12)


def test_an_objective_divides_as_its_keys_say():
    scores = torch.tensor([0.2, 0.4, 0.9, 0.5, 3.0, 5.0, 4.0, 4.0], dtype=torch.float64)
    group = torch.arange(8) // 4
    for std, unbiased in (("none", False), ("group", True), ("global", True)):
        config = base()
        config.sample.advantage_std, config.sample.unbiased_std = std, unbiased
        advantages, _ = GRPO(config, Schedule(torch.linspace(1, 0, 5))).targets(scores, group)
        expected = scores - scores.reshape(2, 4).mean(1).repeat_interleave(4)
        spread = {"none": 1, "global": scores.std()}.get(std)
        if spread is None:
            spread = scores.reshape(2, 4).std(1).repeat_interleave(4)
        close(advantages, expected / (spread + 1e-4 * (std != "none")), atol=1e-12)
