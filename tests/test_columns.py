"""What a reward returns beside its score overwrites nothing of the run's, nor of another reward."""

from __future__ import annotations

import numpy as np
import pytest
from serving import HANG_S, pictures, rows, serve

from config.base import base
from flow_grpo.evaluation import tables
from flow_grpo.prompts import Prompt
from flow_grpo.rewards.base import ENDS, OURS
from flow_grpo.rewards.combine import Scorer
from flow_grpo.rewards.registry import REWARDS
from flow_grpo.rewards.remote import servers
from flow_grpo.rewards.remote.servers import Servers
from flow_grpo.training.tracking import Tracker

BATCH = rows(pictures(3, side=16))
pytestmark = pytest.mark.usefixtures("patient")


@pytest.fixture
def score(monkeypatch):
    """Return score({name: columns}), of rewards of this process."""

    def run(columns: dict[str, dict]) -> dict[str, np.ndarray]:
        for name, found in columns.items():
            monkeypatch.setitem(REWARDS, name, lambda batch, found=found: found)
        scorer = Scorer(dict.fromkeys(columns, 1.0), {})
        try:
            return scorer.score(BATCH)
        finally:
            scorer.close()

    return run


TAKEN = sorted(OURS) + ["one_low", "one_high", "one_missing", "avg_low", "two_high", "one/tag", "/"]


@pytest.mark.parametrize("column", TAKEN)
def test_a_name_of_the_run_s_own_is_refused(column, score):
    zeros = np.zeros(3)
    with pytest.raises(RuntimeError, match=f"reward 'one' returned a column '{column}', which is"):
        score({"one": {"one": zeros, column: zeros}, "two": {"two": zeros}})


@pytest.mark.parametrize("column", ["a\nb", "x" * 300, "\x00", 5])
def test_what_can_head_no_column_is_refused(column, score):
    with pytest.raises(RuntimeError, match="reward 'one'"):
        score({"one": {"one": np.zeros(3), column: np.zeros(3)}})


@pytest.mark.parametrize("column", ["low", "steps", "one_lowest", "tags", "avg_", "one_unparsed"])
def test_other_names_are_free(column, score):
    found = score({"one": {"one": np.zeros(3), column: np.arange(3)}})
    assert found[column].tolist() == [0, 1, 2]


@pytest.mark.parametrize("column", ["step", "epoch", "kind", "prompt", "avg", "ocr", "mean_low"])
def test_a_server_s_columns_are_held_to_the_same(column):
    def more(batch):
        return {"mean": np.ones(len(batch)), column: np.full(len(batch), 7.0)}

    with serve(more) as server:
        scorer = Scorer(
            {"mean": 1.0, "jpeg_compressibility": 0.0},
            {},
            where=Servers({"mean": [server.url]}, HANG_S),
        )
        with pytest.raises(RuntimeError, match=f"'mean' returned a column '{column}'"):
            scorer.score(BATCH)
        scorer.close()


@pytest.mark.parametrize("name", ["shapes", "pickscore", "jpeg_compressibility"])
def test_a_server_of_a_known_reward_gives_no_other_reward_s_figure(name):
    """Also where the other one is known, is not asked for, or comes from elsewhere."""
    other = {"shapes": "shapes_strict", "pickscore": "clipscore"}.get(name, "shapes")

    def more(batch):
        return {name: np.ones(len(batch)), other: np.full(len(batch), 7.0)}

    def own(batch):
        return {other: np.zeros(len(batch))}

    with serve(more, name=name) as one, serve(own, name=other) as two:
        where = Servers({name: [one.url], other: [two.url]}, HANG_S)
        for weights in ({name: 1.0, other: 1.0}, {other: 1.0, name: 1.0}):
            scorer = Scorer(weights, {}, where=where)
            with pytest.raises(RuntimeError, match=f"'{name}' returned a column '{other}'"):
                scorer.score(BATCH)
            scorer.close()


def test_rewards_that_give_each_other_s_score_must_agree(score):
    ones, nan = np.ones(3), np.array([1, np.nan, 1])
    both = {"one": {"one": ones, "one_part": nan}, "one_part": {"one_part": ones}}
    for names in (("one", "one_part"), ("one_part", "one")):
        found = score({name: both[name] for name in names})
        assert found["one_part"].tolist() == [1, 1, 1]  # its own reward's
    with pytest.raises(RuntimeError, match="'one' returned a column 'one_part', .* that of"):
        score({"one": {"one": ones, "one_part": ones}, "one_part": {"one_part": 2 * ones}})


@pytest.mark.parametrize("name", ["step", "prompt", "avg", "a/b"])
def test_a_reward_that_only_its_server_knows_can_t_be_called_like_a_column(name):
    config = base()
    with config.unlocked():
        config.update({"reward_fn": {name: 1.0}, "reward_urls": {name: ["http://127.0.0.1:1"]}})
    with pytest.raises(ValueError, match=f"a reward can't be called '{name}'"):
        servers.of(config)


def test_the_names_that_are_refused_are_those_that_a_run_writes(tmp_path):
    tables.write_scores(tmp_path / "a.csv", {}, [Prompt("x", {})])
    header = (tmp_path / "a.csv").read_text().splitlines()[0].split(",")
    assert set(header) <= OURS and set(ENDS) == {"_low", "_high", "_missing"}
    tracker = Tracker(type("Ranks", (), {"is_main": True})(), tmp_path)
    for key in ("kind", "epoch", "step"):
        with pytest.raises(AssertionError):
            tracker.log("eval", 0, 0, {key: 1.0})
    assert not (tmp_path / "metrics.jsonl").exists()
