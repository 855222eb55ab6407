"""Intervals over prompts, and the tables made of them."""

import csv

import numpy as np
import pytest

from flow_grpo.evaluation import intervals
from flow_grpo.evaluation.intervals import interval, mean, paired_interval
from flow_grpo.evaluation.tables import MEAN_OF_TAGS, compare, outcomes, summarise, table, write_csv

NAN = float("nan")


def draw(rng, num_prompts=40, num_rows=5, spread=1.0):
    """Rows of prompts that differ more than the rows of one do; the true mean is 0."""
    prompts = np.repeat([f"prompt {n}" for n in range(num_prompts)], num_rows)
    of_prompt = np.repeat(rng.normal(0, spread, num_prompts), num_rows)
    return of_prompt + rng.normal(0, 0.3, len(of_prompt)), prompts


def test_the_interval_covers_the_true_mean_19_times_in_20_only_if_prompts_are_drawn():
    covered = {"prompts": 0, "rows": 0}
    for trial in range(300):
        values, prompts = draw(np.random.default_rng(trial))
        for name, clusters in {"prompts": prompts, "rows": np.arange(len(values))}.items():
            low, high = interval(values, clusters.astype(str))
            covered[name] += low <= 0 <= high
    assert 0.91 <= covered["prompts"] / 300 <= 0.97  # 0.95 less a little, at 40 prompts
    assert covered["rows"] / 300 < 0.75


def test_its_width_is_that_of_the_prompts_means():
    values, prompts = draw(np.random.default_rng(1), num_prompts=400)
    low, high = interval(values, prompts)
    standard_error = values.reshape(400, 5).mean(1).std(ddof=1) / 400**0.5
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.05)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.2 * standard_error)


def test_copies_of_a_prompts_rows_add_no_evidence():
    rng = np.random.default_rng(2)
    values, prompts = rng.normal(size=30), [f"prompt {n}" for n in range(30)]
    once = interval(values, prompts)
    assert interval(np.tile(values, 8), prompts * 8) == pytest.approx(once, abs=1e-12)
    shuffled = rng.permutation(30)
    wide = interval(values[shuffled], [prompts[n] for n in shuffled])
    assert wide == pytest.approx(once, abs=1e-12)


def test_it_is_what_drawing_whole_prompts_with_all_their_rows_gives():
    rng = np.random.default_rng(8)
    prompts = [f"prompt {n}" for n in range(60) for _ in range(1 + n % 7)]
    values = np.array([int(name[7:]) % 7 / 7 + rng.normal(0, 0.5) for name in prompts])
    rows = {
        name: [v for v, p in zip(values, prompts, strict=True) if p == name] for name in prompts
    }
    names = list(rows)
    means = [
        np.mean([value for name in rng.choice(names, len(names)) for value in rows[name]])
        for _ in range(2000)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    assert interval(values, prompts) == pytest.approx((low, high), abs=0.06 * (high - low))


def test_rows_without_a_score_are_left_out():
    values, prompts = draw(np.random.default_rng(3))
    holes = values.copy()
    holes[::7] = NAN
    kept = ~np.isnan(holes)
    assert interval(holes, prompts) == interval(values[kept], prompts[kept])
    other = values + np.random.default_rng(4).normal(0.5, 0.1, len(values))
    assert paired_interval(holes, other, prompts) == interval((other - values)[kept], prompts[kept])


def test_a_paired_interval_is_far_narrower_than_two_of_their_own():
    values, prompts = draw(np.random.default_rng(5))
    other = values + 0.1 + np.random.default_rng(6).normal(0, 0.05, len(values))
    low, high = paired_interval(values, other, prompts)
    assert 0 < low < 0.1 < high
    own = interval(values, prompts)
    assert high - low < 0.1 * (own[1] - own[0])


def test_one_prompt_gives_no_interval_and_equal_values_one_without_width():
    assert np.isnan(interval(np.array([0.0, 1.0]), ["a", "a"])).all()
    assert np.isnan(interval(np.array([NAN, 1.0]), ["a", "b"])).all()
    assert np.isnan(interval(np.array([]), [])).all()
    assert interval(np.full(7, 0.1), list("abcdefg")) == (0.1, 0.1)


def test_chunks_do_not_change_the_draws(monkeypatch):
    values, prompts = draw(np.random.default_rng(7))
    whole = interval(values, prompts)
    monkeypatch.setattr(intervals, "CHUNK", 100)
    assert interval(values, prompts) == whole == interval(values, prompts)
    assert interval(values, prompts, seed=1) != whole
    narrow = interval(values, prompts, level=0.5)
    assert whole[0] < narrow[0] < narrow[1] < whole[1]


def test_strata_count_alike_and_are_drawn_apart():
    rng = np.random.default_rng(9)
    sizes = {"large": 300, "small": 30, "middle": 60}
    strata = [name for name, size in sizes.items() for _ in range(size)]
    values = np.concatenate([rng.normal(n, 1 + n, size) for n, size in enumerate(sizes.values())])
    parts = [values[np.array(strata) == name] for name in sizes]
    centre = np.mean([part.mean() for part in parts])
    assert mean(values, strata) == pytest.approx(centre) != pytest.approx(values.mean(), abs=0.1)
    low, high = interval(values, [str(n) for n in range(len(values))], strata)
    error = sum(part.var(ddof=1) / len(part) for part in parts) ** 0.5 / 3
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.06)
    assert (low + high) / 2 == pytest.approx(centre, abs=0.2 * error)


def test_a_stratum_of_one_prompt_gives_no_interval_and_one_without_a_score_no_mean():
    strata = ["x", "x", "y"]
    assert np.isnan(interval(np.array([0.0, 1.0, 1.0]), list("abc"), strata)).all()
    assert mean(np.array([0.0, 1.0, 1.0]), strata) == 0.75
    assert np.isnan(mean(np.array([0.0, 1.0, NAN]), strata))


SCORES = {"a": np.array([0.0, 1.0, NAN, 1.0]), "b": np.array([NAN, NAN, 2.0, 3.0])}
TAGS, PROMPTS = ["x", "x", "y", ""], ["one", "two", "two", "three"]


def test_a_summary_averages_all_rows_and_those_of_each_tag():
    rows = {(row.score, row.tag): row for row in summarise(SCORES, TAGS, PROMPTS)}
    assert list(rows) == [(name, tag) for name in "ab" for tag in ("", "x", "y", MEAN_OF_TAGS)]
    everything = rows["a", ""]
    assert everything[2:6] == (3, 1, 3, pytest.approx(2 / 3))
    assert everything[6:] == interval(SCORES["a"], PROMPTS)
    assert rows["b", "x"][2:5] == (0, 2, 0) and np.isnan(rows["b", "x"].mean)
    assert rows["b", "y"][2:6] == (1, 0, 1, 2.0) and np.isnan(rows["b", "y"].low)


def test_the_mean_of_tags_is_the_benchmarks_score():
    scores = {"a": np.array([1.0, 1, 0, 0, 1, 1, NAN, 9])}
    tags = ["x", "x", "x", "x", "y", "y", "y", ""]
    rows = {row.tag: row for row in summarise(scores, tags, list("abcdefgh"))}
    assert rows[MEAN_OF_TAGS][2:6] == (6, 1, 6, 0.75)
    assert rows[MEAN_OF_TAGS][6:] == interval(scores["a"][:7], list("abcdefg"), tags[:7])
    assert MEAN_OF_TAGS not in {row.tag for row in summarise(scores, ["x"] * 8, list("abcdefgh"))}
    less = {"a": scores["a"] - np.array([0, 0, 0, 0, 1, 1, 1, 1])}
    change = {row.tag: row for row in compare(scores, less, tags, list("abcdefgh"))}
    assert change[MEAN_OF_TAGS][2:4] == (6, -0.5)


def test_a_comparison_counts_rows_and_pairs_them(tmp_path):
    first = {"a": np.array([0.0, 0.0, 1.0, 0.5, NAN]), "only here": np.zeros(5)}
    second = {"a": np.array([1.0, 0.0, 0.0, 1.0, 1.0])}
    rows = compare(first, second, ["x", "x", "x", "", ""], list("pqrst"))
    everything, tagged = rows
    assert everything[:4] == ("a", "", 4, pytest.approx(0.125))
    assert everything[4:6] == paired_interval(first["a"], second["a"], list("pqrst"))
    assert everything[6:] == (2, 1, 1) and tagged[6:] == (1, 1, 1)
    write_csv(tmp_path / "pairwise.csv", rows)
    with (tmp_path / "pairwise.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [float(row["low"]) for row in read] == [row.low for row in rows]
    assert "2 rows higher, 1 equal, 1 lower" in outcomes(rows)


def test_the_table_has_a_line_a_score_and_a_column_a_tag():
    lines = table(summarise(SCORES, TAGS, PROMPTS)).splitlines()
    assert lines[0].split() == ["all", "x", "y", MEAN_OF_TAGS]
    assert lines[1].split()[:2] == ["a", "0.667"] and lines[1].split()[-2:] == ["-", "-"]
    assert lines[2].split()[-3:] == ["-", "2.000", "-"] and len({len(line) for line in lines}) == 1
