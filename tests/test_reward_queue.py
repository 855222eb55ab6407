"""The way of rows from sampling to the rewards: whole groups, a thread each, no endless wait."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from flow_grpo.rewards import combine
from flow_grpo.rewards.base import reward
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.combine import Scorer
from flow_grpo.rewards.registry import REWARDS
from flow_grpo.rewards.remote.servers import SomeFailed

HANG_S = 600.0  # of a test that hangs
GROUP_SIZE, NUM_GROUPS = 4, 6
NUM_ROWS = GROUP_SIZE * NUM_GROUPS


@pytest.fixture
def scorer(monkeypatch):
    """Return scorer({name: function}, ...), which compare if they were made to."""
    made = []

    def make(functions, **more):
        for name, function in functions.items():
            monkeypatch.setitem(REWARDS, name, function)
        made.append(Scorer(dict.fromkeys(functions, 1.0), {}, group_size=GROUP_SIZE, **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


def rows(numbers, groups=None) -> Batch:
    """Rows that can be told apart by each of their columns."""
    images = [np.full((4, 4, 3), number, np.uint8) for number in numbers]
    prompts, metadata = [f"prompt {n}" for n in numbers], [{"number": n} for n in numbers]
    group = np.array([n // GROUP_SIZE for n in numbers]) if groups is None else np.array(groups)
    return Batch(images, prompts, metadata, [(image, image + 1) for image in images], group)


def numbers_of(batch: Batch) -> list[int]:
    """The rows' numbers, as all columns say."""
    numbers = [int(image[0, 0, 0]) for image in batch.images]
    assert batch.prompts == [f"prompt {n}" for n in numbers]
    assert batch.metadata == [{"number": n} for n in numbers]
    assert [row[1][0, 0, 0] for row in batch.references] == [n + 1 for n in numbers]
    return numbers


class Comparing:
    """Score a row by its place in its group, and remember the calls."""

    def __init__(self):
        self.calls: list[list[int]] = []

    def reward(self, **more):
        @reward(needs_groups=True, **more)
        def places(batch):
            self.calls.append(numbers_of(batch))
            scores = np.full(len(batch), np.nan)
            for group in np.unique(batch.group):
                members = np.flatnonzero(batch.group == group)
                assert len(members) == GROUP_SIZE
                scores[members] = np.argsort(np.argsort([self.calls[-1][n] for n in members]))
            return {"places": scores}

        return places


@pytest.mark.parametrize("batch_size", [1, 3, 4, 8, 24])
def test_a_comparing_reward_gets_whole_groups_however_many_calls_they_took(scorer, batch_size):
    comparing = Comparing()
    scoring = scorer({"places": comparing.reward()}).start()
    for start in range(0, NUM_ROWS, batch_size):
        scoring.add(rows(range(start, start + batch_size)))
    found = scoring.result(HANG_S)
    assert found["places"].tolist() == found["avg"].tolist() == [0, 1, 2, 3] * NUM_GROUPS
    whole = max(GROUP_SIZE, batch_size // GROUP_SIZE * GROUP_SIZE)  # those that a call completes
    assert comparing.calls == [list(range(n, n + whole)) for n in range(0, NUM_ROWS, whole)]


def test_groups_may_be_completed_in_any_order(scorer):
    comparing = Comparing()
    scoring = scorer({"places": comparing.reward()}).start()
    order = np.random.default_rng(0).permutation(NUM_ROWS).tolist()
    for start in range(0, NUM_ROWS, 3):
        scoring.add(rows(order[start : start + 3]))
    found = scoring.result(HANG_S)["places"]
    assert found.tolist() == [n % GROUP_SIZE for n in order]  # in the order of add()


def test_any_other_reward_gets_each_call_at_once(scorer):
    comparing, calls, called = Comparing(), [], threading.Semaphore(0)

    def each(batch):
        calls.append(numbers_of(batch))
        called.release()
        return {"each": np.array(calls[-1], float)}

    scoring = scorer({"places": comparing.reward(), "each": each}).start()
    for start in range(0, NUM_ROWS, 3):
        scoring.add(rows(range(start, start + 3)))
        assert called.acquire(timeout=HANG_S)  # before the next call is added
    assert scoring.result(HANG_S)["each"].tolist() == list(range(NUM_ROWS))
    assert calls == [[n, n + 1, n + 2] for n in range(0, NUM_ROWS, 3)]


def test_an_evaluation_has_no_groups_to_wait_for(scorer):
    @reward(needs_groups=True)
    def places(batch):
        assert batch.group is None
        return {"places": np.full(len(batch), np.nan)}

    scoring = scorer({"places": places}).start(held_out=True)
    batch = rows(range(3))
    batch.group = None
    scoring.add(batch)
    assert np.isnan(scoring.result(HANG_S)["places"]).all()


def test_a_group_that_is_never_whole_is_our_mistake(scorer):
    scoring = scorer({"places": Comparing().reward()}).start()
    scoring.add(rows(range(5)))
    with pytest.raises(AssertionError, match=r"groups \[1\] are not whole"):
        scoring.result(HANG_S)


def test_a_reward_does_not_wait_for_another(scorer):
    """In one thread the first would wait for ever for the second."""
    first, second = threading.Event(), threading.Event()

    def waits(batch):
        first.set()
        assert second.wait(HANG_S)
        return {"waits": np.zeros(len(batch))}

    def goes(batch):
        assert first.wait(HANG_S)
        second.set()
        return {"goes": np.ones(len(batch))}

    scoring = scorer({"waits": waits, "goes": goes}).start()
    scoring.add(rows(range(2)))
    assert scoring.result(HANG_S)["avg"].tolist() == [1, 1]


def test_two_scorings_do_not_mix_up_their_rows(scorer):
    made = scorer({"places": Comparing().reward()})
    one, two = made.start(), made.start()
    for start in range(0, 8, 2):
        one.add(rows(range(start, start + 2)))
        two.add(rows(range(start + 1, start - 1, -1)))
    assert one.result(HANG_S)["avg"].tolist() == [0, 1, 2, 3] * 2
    assert two.result(HANG_S)["avg"].tolist() == [1, 0, 3, 2] * 2


def picky(batch):
    """Fails for the second call, and for a row of the third; the first has one column more."""
    numbers = numbers_of(batch)
    scores = {"picky": np.array(numbers, float)}
    if numbers[0] == 3:
        raise ValueError("no")
    if numbers[0] == 6:
        raise SomeFailed("one row", {"picky": np.array([6, np.nan, 8])})
    return scores | ({"more": scores["picky"]} if numbers[0] == 0 else {})


def test_a_failure_masks_the_rows_of_its_own_call(scorer):
    made = scorer({"picky": picky}, masks=True)
    scoring, nan = made.start(), np.nan
    for start in range(0, 12, 3):
        scoring.add(rows(range(start, start + 3)))
    found = scoring.result(HANG_S)
    expected = [0, 1, 2, nan, nan, nan, 6, nan, 8, 9, 10, 11]
    np.testing.assert_array_equal(found["picky"], expected)
    np.testing.assert_array_equal(found["avg"], expected)
    np.testing.assert_array_equal(found["more"], [0, 1, 2, *[nan] * 9])
    assert "reward 'picky' failed" in made.last_masked


def test_a_failure_stops_where_it_is_not_masked(scorer):
    scoring = scorer({"picky": picky}).start()
    for start in range(0, 12, 3):
        scoring.add(rows(range(start, start + 3)))
    with pytest.raises(RuntimeError, match="reward 'picky' failed: no"):
        scoring.result(HANG_S)


def test_a_reward_that_hangs_is_named_and_does_not_keep_the_scorer_open(scorer, monkeypatch):
    monkeypatch.setattr(combine, "CLOSE_S", 0.01)
    begun, ended, seen = threading.Event(), threading.Event(), []

    def hangs(batch):
        seen.append(numbers_of(batch))
        begun.set()
        ended.wait(HANG_S)
        return {"hangs": np.zeros(len(batch))}

    made = scorer({"hangs": hangs})
    scoring = made.start()
    for start in range(0, 6, 3):
        scoring.add(rows(range(start, start + 3)))
    assert begun.wait(HANG_S)
    with pytest.raises(RuntimeError, match="reward 'hangs' gave no scores for a call in 0.01 s"):
        scoring.result(0.01)
    made.close()  # returns
    (thread,) = (each for each in threading.enumerate() if each.name.startswith("reward-hangs"))
    ended.set()
    thread.join(HANG_S)
    assert seen == [[0, 1, 2]]  # the second call was dropped


def test_closing_waits_for_the_call_that_is_being_made(scorer, monkeypatch):
    monkeypatch.setattr(combine, "CLOSE_S", HANG_S)
    begun, may_finish, finished = threading.Event(), threading.Event(), []

    def slow(batch):
        begun.set()
        assert may_finish.wait(HANG_S)
        finished.append(1)
        return {"slow": np.zeros(len(batch))}

    made = scorer({"slow": slow})
    scoring = made.start()
    scoring.add(rows(range(3)))
    scoring.add(rows(range(3)))  # queued, and dropped
    assert begun.wait(HANG_S)
    threading.Timer(0.05, may_finish.set).start()
    made.close()
    assert finished == [1]
