"""A judge of pairs: win rates in a group."""

import numpy as np
import pytest
from judging import RNG, asking, said

from flow_grpo.rewards import loading
from flow_grpo.rewards.judges.unifiedreward import win_rates


@pytest.fixture
def ask(monkeypatch):
    with asking(monkeypatch) as run:
        yield run


def widest(pictures, text, count):
    """A fair judge, which prefers the wider image whatever its place."""
    first = pictures[0].shape[1] > pictures[1].shape[1]
    return said(f"Thus:\nImage {1 if first else 2} is better")


def test_pairs_score_the_share_of_the_group_that_a_picture_beats(ask):
    found, endpoint = ask("unifiedreward_pairs", widest, 6, np.array([7, 7, 7, 2, 2, 2]))
    assert found["unifiedreward_pairs"].tolist() == [0, 0.5, 1, 0, 0.5, 1]
    assert found["unifiedreward_pairs_unparsed"].tolist() == [0] * 6
    assert len(endpoint.requests) == 6  # 3 pairs a group


def test_pairs_are_shown_in_either_order_and_always_in_the_same(ask):
    orders = []

    def watch(pictures, text, count):
        orders.append(tuple(picture.shape[1] for picture in pictures))
        return widest(pictures, text, count)

    ask("unifiedreward_pairs", watch, 6, np.zeros(6))
    once, swapped = set(orders), sum(a > b for a, b in orders)
    assert len(once) == 15 and 3 <= swapped <= 12
    orders.clear()
    ask("unifiedreward_pairs", watch, 6, np.zeros(6))
    assert set(orders) == once


def test_a_judge_that_always_likes_the_first_place_is_split_by_the_random_order(ask):
    """The coin, not the order in the batch, decides: no image wins all of its pairs."""
    group = np.zeros(6)
    found, _ = ask("unifiedreward_pairs", lambda *q: said("Image 1 is better"), 6, group)
    scores = found["unifiedreward_pairs"]
    assert scores.sum() == 3 and scores.tolist() != [1, 0.8, 0.6, 0.4, 0.2, 0]


def test_a_pair_without_a_verdict_counts_half_and_a_picture_without_any_is_nan(ask):
    def shy(pictures, text, count):
        widths = {picture.shape[1] for picture in pictures}
        return said("A tie.") if 8 in widths else widest(pictures, text, count)

    found, _ = ask("unifiedreward_pairs", shy, 3, np.zeros(3))
    np.testing.assert_array_equal(found["unifiedreward_pairs"], [np.nan, 0.25, 0.75])
    assert found["unifiedreward_pairs_unparsed"].tolist() == [1, 0.5, 0.5]


def test_without_groups_there_is_nothing_to_compare(ask):
    assert loading.find("unifiedreward_pairs").needs_groups
    assert not loading.find("qwenvl").needs_groups
    found, endpoint = ask("unifiedreward_pairs", widest, 3)
    assert np.isnan(found["unifiedreward_pairs"]).all() and not endpoint.requests


def test_win_rates_of_a_group_of_four():
    # (0,1)=0 (0,2)=1 (0,3) without a verdict (1,2)=1 (1,3)=1 (2,3)=0, seen from the first
    nan = np.nan
    results = np.array([[nan, 0, 1, nan], [1, nan, 1, 1], [0, 0, nan, 0], [nan, 0, 1, nan]])
    assert win_rates(results).tolist() == [0.5, 1, 0, 0.5]


def test_win_rates_sum_to_half_the_group():
    upper = np.triu(RNG.integers(0, 3, (9, 9)) / 2, 1)
    assert win_rates(upper + np.tril(1 - upper.T, -1)).sum() == pytest.approx(4.5, abs=1e-12)
    with pytest.raises(AssertionError, match="add up to 1"):
        win_rates(upper)
