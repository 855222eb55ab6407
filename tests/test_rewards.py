import threading

import numpy as np
import pytest
from PIL import Image

from flow_grpo.rewards import loading
from flow_grpo.rewards.base import Plain, Reward
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.combine import Scorer
from flow_grpo.rewards.registry import REWARDS
from flow_grpo.rewards.rules.jpeg import jpeg_compressibility, jpeg_incompressibility

NOISE = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
FLAT = np.full((48, 40, 3), 90, np.uint8)
HANG_S = 600.0  # of a test that hangs


def jpeg_bytes(image, path):
    Image.fromarray(image).save(path, quality=95)
    return path.stat().st_size


def test_jpeg_rewards_are_the_size_of_the_file_that_pil_writes(tmp_path):
    sizes = np.array([jpeg_bytes(image, tmp_path / "x.jpg") for image in (NOISE, FLAT)])
    assert sizes[0] > 3 * sizes[1]
    large = jpeg_incompressibility(Batch([NOISE, FLAT], ["", ""], [{}, {}]))
    small = jpeg_compressibility(Batch([NOISE, FLAT], ["", ""], [{}, {}]))
    np.testing.assert_allclose(large["jpeg_incompressibility"], sizes / 1000, rtol=1e-12)
    np.testing.assert_allclose(small["jpeg_compressibility"], -sizes / 500_000, rtol=1e-12)


def test_the_jpeg_reward_of_a_video_is_the_mean_of_its_frames(tmp_path):
    sizes = [jpeg_bytes(image, tmp_path / "x.jpg") for image in (NOISE, FLAT, FLAT)]
    video = np.stack([NOISE, FLAT, FLAT])
    (score,) = jpeg_incompressibility(Batch([video], [""], [{}]))["jpeg_incompressibility"]
    assert score == pytest.approx(sum(sizes) / 3000)


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_is_a_function_or_a_class_that_says_what_it_does(name):
    found = loading.find(name)
    assert found.__doc__ and (isinstance(found, Plain) or issubclass(found, Reward))


@pytest.fixture
def scorer(monkeypatch):
    """Return scorer(weights, name=function, ...), of rewards that are these functions."""
    made = []

    def make(weights, **functions):
        for name, function in functions.items():
            monkeypatch.setitem(REWARDS, name, function)
        made.append(Scorer(weights, {}))
        return made[-1]

    yield make
    for one in made:
        one.close()


def gives(**columns):
    return lambda batch: columns


def rows(count):
    return Batch([FLAT] * count, [""] * count, [{}] * count)


def run(scorer, num_rows=3):
    return scorer.score(rows(num_rows))


def test_avg_is_the_weighted_sum_and_other_columns_are_kept(scorer):
    combined = scorer(
        {"one": 0.5, "two": -2.0},
        one=gives(one=[1, 2, 3], accuracy=[1, 0, 1]),
        two=gives(two=np.float32([0.5, 0.25, 0])),
    )
    scores = run(combined)
    assert set(scores) == {"one", "two", "accuracy", "avg"}
    assert scores["avg"].tolist() == [-0.5, 0.5, 1.5] and scores["accuracy"].tolist() == [1, 0, 1]
    assert all(column.dtype == np.float64 for column in scores.values())


def test_a_reward_of_weight_zero_is_monitored_alone(scorer):
    combined = scorer({"one": 1.0, "two": 0.0}, one=gives(one=[1, 2, 3]), two=gives(two=[9, 9, 9]))
    scores = run(combined)
    assert scores["avg"].tolist() == [1, 2, 3] and scores["two"].tolist() == [9, 9, 9]


def test_a_row_lacks_avg_where_it_lacks_a_reward_that_counts(scorer):
    nan = np.nan
    combined = scorer(
        {"one": 1.0, "two": 0.0}, one=gives(one=[1, nan, 3]), two=gives(two=[nan, nan, 5])
    )
    np.testing.assert_array_equal(run(combined)["avg"], [1, nan, 3])


def test_a_scorer_sees_the_batch_as_it_was_added(scorer):
    seen = []

    def watch(batch):
        seen.append(batch)
        return {"watch": np.zeros(1)}

    batch = Batch([FLAT], ["p"], [{"a": 1}], [(NOISE,)], np.array([7]))
    scoring = scorer({"watch": 1.0}, watch=watch).start()
    scoring.add(batch)
    assert scoring.result(HANG_S).keys() == {"watch", "avg"}
    assert len(seen) == 1 and seen[0] is batch


@pytest.mark.parametrize(
    "columns",
    [
        {"bad": [1, 2]},
        {"bad": [1, 2, 3], "extra": [1]},
        {"bad": 1.0},
        {"bad": [[1], [2], [3]]},
        {"other": [1, 2, 3]},
        {"bad": [1, np.inf, 3]},
        {"bad": [1, 2, 3], "extra": [0, 0, -np.inf]},
    ],
)
def test_a_reward_that_returns_no_finite_column_of_its_own_is_named(scorer, columns):
    combined = scorer({"good": 1.0, "bad": 0.0}, good=gives(good=[1, 2, 3]), bad=gives(**columns))
    with pytest.raises(RuntimeError, match="reward 'bad' must return 'bad': \\(3,\\)"):
        run(combined)


@pytest.mark.parametrize("result", [None, [1, 2, 3], {"bad": ["a", "b", "c"]}])
def test_a_reward_that_returns_no_numbers_is_named(scorer, result):
    with pytest.raises(RuntimeError, match="reward 'bad'"):
        run(scorer({"bad": 1.0}, bad=lambda batch: result))


def test_an_exception_inside_a_reward_names_it_and_its_cause(scorer):
    def bad(batch):
        raise ConnectionError("no answer from port 18085")

    scoring = scorer({"bad": 1.0}, bad=bad).start()
    scoring.add(rows(1))
    with pytest.raises(RuntimeError, match="reward 'bad' failed: no answer from port") as error:
        scoring.result(HANG_S)
    assert isinstance(error.value.__cause__, ConnectionError)


def test_scoring_goes_on_in_the_background_in_the_order_of_the_calls(scorer):
    may_finish, order = threading.Event(), []

    def slow(batch):
        assert may_finish.wait(HANG_S)
        order.append(len(batch))
        return {"slow": np.full(len(batch), float(len(batch)))}

    scoring = scorer({"slow": 1.0}, slow=slow).start()
    for count in (3, 1, 2):
        scoring.add(rows(count))
    assert not order  # and add() has returned
    may_finish.set()
    assert scoring.result(HANG_S)["avg"].tolist() == [3, 3, 3, 1, 2, 2] and order == [3, 1, 2]
