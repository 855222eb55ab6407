"""Whole runs whose rewards come over HTTP, fail, or are several."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import running
import serving
import torch
from fixtures import randn
from serving import serve

from flow_grpo.advantages import gdpo_advantages
from flow_grpo.evaluation import alarm
from flow_grpo.evaluation.diversity import SIDE, diversity, thumbnails
from flow_grpo.launch import entry, preflight, settings
from flow_grpo.prompts import Prompt
from flow_grpo.rewards.base import reward
from flow_grpo.rewards.registry import REWARDS
from flow_grpo.rewards.rules.jpeg import jpeg_incompressibility
from flow_grpo.training import collect

NAME = "jpeg_incompressibility"
EVALUATED = 8  # images of an evaluation: 6 prompts in batches of 4
pytestmark = pytest.mark.usefixtures("fresh_logs", "patient")


def over_http(url: str, **more) -> dict:
    return {"reward_urls": {NAME: [url]}, **more}


class Failing:
    """Scores, until it is told otherwise."""

    def __init__(self, after: float = math.inf, rows: int = 0):
        self.num_scored, self.after, self.rows = 0, after, rows

    def __call__(self, batch) -> dict[str, np.ndarray]:
        self.num_scored += len(batch)
        if self.num_scored > self.after:
            raise RuntimeError("out of memory")
        scores = jpeg_incompressibility(batch)
        scores[NAME][: self.rows] = np.nan
        return scores


def rows(run, kind: str) -> list[dict]:
    return [row for row in running.metrics(run.folder) if row["kind"] == kind]


def same_weights(one, other) -> bool:
    ours, theirs = running.weights(one.folder), running.weights(other.folder)
    return all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_run_scored_over_http_is_the_run_scored_here(files):
    local = running.train(running.arguments(files, run_name="here"))
    with serve(jpeg_incompressibility, name=NAME) as server:
        remote = running.train(running.arguments(files, run_name="there", **over_http(server.url)))
        assert server.batcher.num_scored == 2 * 16 + 2 * EVALUATED
    assert running.metrics(local.folder) == running.metrics(remote.folder)
    assert same_weights(remote, local)
    assert rows(remote, "epoch")[0]["reward/zero_std_fraction"] <= 0.5


@pytest.mark.parametrize(
    "dies",
    [pytest.param("in the first epoch", marks=pytest.mark.slow), "in the second one"],
)
def test_a_run_whose_reward_fails_saves_stops_and_goes_on_as_if_nothing_had_been(files, dies):
    whole = running.train(running.arguments(files, run_name="whole"))
    after = EVALUATED + (8 if dies == "in the first epoch" else 16 + 8)
    failing = Failing(after)
    with serve(failing, name=NAME) as server:
        argv = running.arguments(files, run_name="broken", **over_http(server.url))
        broken = running.prepare(argv)
        assert entry.execute(broken) == 1
        assert broken.epoch == (dies != "in the first epoch")
        assert len(rows(broken, "epoch")) == broken.epoch
        failing.after = math.inf
        resumed = running.train([*argv, "--config.resume_from=latest"])
    assert rows(resumed, "epoch") == rows(whole, "epoch") and same_weights(resumed, whole)


def test_the_message_of_a_run_that_stops_names_reward_url_and_remedy(files, capsys):
    with serve(Failing(EVALUATED), name=NAME) as server:
        argv = running.arguments(files, run_name="message", **over_http(server.url))
        assert entry.execute(running.prepare(argv)) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"reward '{NAME}' failed: {server.url}: status 500: RuntimeError: out of" in message
    assert "saved in" in message and "--config.resume_from=latest" in message


def test_masked_pictures_leave_their_groups_and_the_others_train(files):
    """A server that fails for the first call of each epoch: 4 of its 16 images are masked."""
    calls = []

    def score(batch):
        calls.append(len(batch))
        if len(calls) in (3, 7):  # 2 are evaluation's
            raise ValueError("no")
        return jpeg_incompressibility(batch)

    with serve(score, name=NAME, max_rows=4) as server:
        argv = over_http(server.url, on_reward_error="mask")
        run = running.train(running.arguments(files, run_name="mask", **argv))
    found = [row["reward/missing"] for row in rows(run, "epoch")]
    assert sum(found) > 0 and max(found) <= 8
    assert all(np.isfinite(row["loss"]) for row in rows(run, "update"))
    assert all(torch.isfinite(value).all() for value in running.weights(run.folder).values())


@pytest.mark.slow
def test_too_many_masked_pictures_stop_the_run_after_saving(files, capsys):
    with serve(Failing(EVALUATED), name=NAME) as server:
        argv = running.arguments(
            files, run_name="masked", on_reward_error="mask", **over_http(server.url)
        )
        run = running.prepare(argv)
        assert entry.execute(run) == 1
    message = capsys.readouterr().err
    assert "16 of 16 images could not be scored" in message
    assert "config.max_masked_fraction=0.5" in message and "out of memory" in message
    assert (run.folder / "checkpoints" / "checkpoint-0").is_dir()


@pytest.mark.parametrize("fraction, status", [(0.2, 1), (0.25, 0)])
def test_the_fraction_is_of_the_pictures_of_an_epoch(files, fraction, status):
    """The server finds one of four images unscorable."""
    with serve(Failing(rows=1), name=NAME, max_rows=4) as server:
        argv = over_http(server.url, max_masked_fraction=fraction)
        argv |= {"sample__test_batch_size": 4, "eval_max_samples": 4, "num_epochs": 1}
        run = running.prepare(running.arguments(files, run_name=f"f{fraction}", **argv))
        assert entry.execute(run) == status


def test_a_local_reward_that_hangs_ends_the_run(files, monkeypatch, capsys):
    ended, calls = threading.Event(), []

    def hangs(batch):
        calls.append(len(batch))
        if len(calls) > 3:
            ended.wait(serving.HANG_S)
        return {"hangs": np.zeros(len(batch))}

    monkeypatch.setitem(REWARDS, "hangs", hangs)
    monkeypatch.setattr("flow_grpo.evaluation.evaluate.PATIENCE_S", 0.2)
    monkeypatch.setattr("flow_grpo.rewards.combine.CLOSE_S", 0.01)
    argv = running.arguments(files, run_name="hang", reward_fn={"hangs": 1}, reward_timeout=0.3)
    assert entry.execute(running.prepare(argv)) == 1
    ended.set()
    message = capsys.readouterr().err
    assert "reward 'hangs' gave no scores for a call in 0.5 s" in message


# Rewards that compare a group's images.


def place(batch) -> dict[str, np.ndarray]:
    """Score an image by its place in its group, from the smallest file to the largest."""
    if batch.group is None:
        return {"place": np.full(len(batch), np.nan)}
    sizes, scores = jpeg_incompressibility(batch)[NAME], np.full(len(batch), np.nan)
    for group in np.unique(batch.group):
        members = np.flatnonzero(batch.group == group)
        assert len(members) == 4
        scores[members] = np.argsort(np.argsort(sizes[members]))
    return {"place": scores}


def comparing(files, name: str, batch_size: int, **more) -> list[str]:
    """A run whose groups of 4 are drawn in calls of this size."""
    return running.arguments(
        files,
        run_name=name,
        reward_fn={"place": 1.0},
        sample__train_batch_size=batch_size,
        sample__num_batches_per_epoch=12 // batch_size,
        train__batch_size=4,
        train__old_log_prob="replay",
        train__gradient_accumulation_steps=3,
        num_epochs=1,
        **more,
    )


def test_a_comparing_reward_may_be_drawn_in_any_number_of_calls(files, monkeypatch):
    monkeypatch.setitem(REWARDS, "place", reward(needs_groups=True)(place))
    runs = {
        size: running.train(comparing(files, f"calls-of-{size}", size)) for size in (1, 3, 4, 12)
    }
    for run in runs.values():
        (epoch,) = rows(run, "epoch")
        assert epoch["reward/place"] == 1.5 and epoch["reward/missing"] == 0


def test_a_server_s_own_comparing_reward_gets_whole_groups(files):
    with serve(place, name="place", compares=True) as server:
        urls = {"reward_urls": {"place": [server.url]}}
        run = running.train(comparing(files, "own", 3, **urls))
        assert rows(run, "epoch")[0]["reward/place"] == 1.5
        keys = urls | {
            "sample__train_batch_size": 3,
            "sample__num_image_per_prompt": 24,
            "train__gradient_accumulation_steps": 1,
        }
        trained, held_out = {"reward_fn": {"place": 1.0}}, {"eval_reward_fn": "('place',)"}
        with pytest.raises(ValueError, match="num_batches_per_epoch=12: the reward 'place' compa"):
            preflight.check(config_of(**keys, **trained, sample__num_batches_per_epoch=12), 2)
        keys["sample__num_batches_per_epoch"] = 16
        preflight.check(config_of(**keys, **trained), 2)
        with pytest.raises(ValueError, match="'place' compares a group's images, and evaluations"):
            preflight.check(config_of(**keys, **held_out), 2)


@pytest.mark.parametrize(
    "batch_size, num_batches, group_size, nearest",
    [
        (3, 12, 24, 16),  # FLUX's 3 images a call
        (3, 17, 24, 16),
        (3, 44, 24, 48),
        (3, 1, 24, 8),
        (4, 3, 8, 4),
        (5, 7, 3, 6),
        (16, 1, 24, 3),
    ],
)
def test_an_epoch_without_whole_groups_is_refused_with_the_nearest_that_has(
    batch_size, num_batches, group_size, nearest
):
    keys = {
        "reward_fn": {"shapes": 1.0, "unifiedreward_pairs": 0.0},
        "sample__train_batch_size": batch_size,
        "sample__num_image_per_prompt": group_size,
        "train__gradient_accumulation_steps": 1,
    }
    with pytest.raises(ValueError) as error:
        preflight.check(config_of(sample__num_batches_per_epoch=num_batches, **keys), group_size)
    assert f"config.sample.num_batches_per_epoch={num_batches}: the reward 'uni" in str(error.value)
    assert str(error.value).endswith(f"The nearest num_batches_per_epoch is {nearest}.")
    preflight.check(config_of(sample__num_batches_per_epoch=nearest, **keys), group_size)


def test_a_reward_fails_on_evaluation_as_it_does_in_training(files):
    with serve(Failing(0), name=NAME) as server:
        run = running.prepare(running.arguments(files, run_name="ev", **over_http(server.url)))
        assert entry.execute(run) == 1 and run.epoch == 0


# Several rewards.


def config_of(**keys):
    argv = [f"--config.{key.replace('__', '.')}={value}" for key, value in keys.items()]
    return settings.load(["x", *argv], "config/testbed.py:shapes_sd3")[0]


def test_gdpo_trains_its_own_sum_and_masks_what_lacks_a_reward():
    config = config_of(
        reward_aggregation="gdpo",
        reward_fn={"shapes": 1.0, "jpeg_compressibility": 0.5, "shapes_strict": 0.0},
    )
    group = torch.arange(24) // 6
    scores = {name: randn(24, seed=n) for n, name in enumerate(config.reward_fn)}
    scores["shapes_strict"][3] = float("nan")  # only monitored
    scores["shapes"][7] = float("nan")
    scores["avg"] = scores["shapes"] + 0.5 * scores["jpeg_compressibility"]
    found = collect.combine(config, scores, group)
    weights = {"shapes": 1.0, "jpeg_compressibility": 0.5}
    truth = gdpo_advantages({name: scores[name] for name in weights}, weights, group)
    assert found.isnan().nonzero().flatten().tolist() == [7]
    kept = torch.arange(24) != 7
    torch.testing.assert_close(found[kept], truth[kept], rtol=0, atol=0)
    config.reward_aggregation = "sum"
    assert collect.combine(config, scores, group) is scores["avg"]


def test_a_run_with_gdpo_has_the_advantages_of_gdpo(files):
    """And not those of the sum, which the reward of the larger scale rules."""
    both = {"jpeg_incompressibility": 1.0, "jpeg_compressibility": 1.0}
    kept = {}
    for how in ("sum", "gdpo"):
        argv = running.arguments(
            files,
            run_name=how,
            reward_fn=both,
            reward_aggregation=how,
            num_epochs=1,
            train__adv_clip_max=100.0,
        )
        run = running.prepare(argv)
        honest = run.objective.points
        kept[how] = {}

        def points(rows, randomness, how=how, honest=honest):
            if rows.advantages is not None:  # those of the gate have none
                owners = zip(rows.batch.owners, rows.advantages.tolist(), strict=True)
                kept[how] |= {(row.group, row.member): advantage for row, advantage in owners}
            return honest(rows, randomness)

        run.objective.points = points
        assert entry.execute(run) == 0
    assert set(kept["sum"]) == set(kept["gdpo"]) and len(kept["gdpo"]) == 16
    # size / 1000 - size / 500,000: the sum goes with the size, and GDPO's two parts cancel.
    assert max(map(abs, kept["gdpo"].values())) < 1e-3 < max(map(abs, kept["sum"].values()))


def test_held_out_rewards_are_scored_in_evaluations_only_and_do_not_train(files):
    plain = running.train(running.arguments(files, run_name="plain"))
    watched = running.train(
        running.arguments(
            files, run_name="watched", eval_reward_fn=("jpeg_compressibility",), eval_freq=1
        )
    )
    evals = rows(watched, "eval")
    assert len(evals) == 3 and all("jpeg_compressibility_low" in row for row in evals)
    assert all("reward/jpeg_compressibility" not in row for row in rows(watched, "epoch"))
    assert evals[0]["avg"] == rows(plain, "eval")[0]["avg"] and same_weights(watched, plain)
    files = sorted(path.name for path in (watched.folder / "evaluations").iterdir())
    assert files == ["000000.csv", "000002.csv", "000004.csv"]


@pytest.mark.parametrize("action, status", [("warn", 0), ("stop", 1)])
def test_the_alarm_is_raised_when_the_held_out_reward_falls(files, action, status, capsys):
    """jpeg_compressibility falls as its opposite is trained."""
    argv = running.arguments(
        files,
        run_name=action,
        eval_reward_fn=("jpeg_compressibility",),
        eval_freq=1,
        num_epochs=3,
        hacking_alarm=action,
    )
    run = running.prepare(argv)
    rounds = []

    def rising(scores, held_out):
        if held_out:  # more with each evaluation, though the untrained model stays what it is
            rounds.append(1)
            rise = len(rounds) * (1 + 0.01 * np.arange(len(scores["avg"])))
            scores["avg"] = scores["avg"] + rise
            scores["jpeg_compressibility"] = scores["jpeg_compressibility"] - rise
        return scores

    running.watch_scores(run, rising)
    assert entry.execute(run) == status
    output = "".join(capsys.readouterr())
    assert "reward hacking: since the second evaluation before" in output
    assert "held-out rewards fell: jpeg_compressibility [-" in output
    if action == "warn":
        assert [row["hacking_alarm"] for row in rows(run, "eval")] == [0, 0, 1, 1]
    else:
        assert run.epoch == 2 and (run.folder / "checkpoints" / "checkpoint-4").is_dir()


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"prompt {n}") for n in range(count)]


@pytest.mark.parametrize(
    "trained, held_out, expected",
    [(0.5, -0.5, True), (0.5, 0.0, False), (0.5, 0.5, False), (0.0, -0.5, False), (-1, -1, False)],
)
def test_the_alarm_needs_both_changes_to_be_clear_of_zero(tmp_path, trained, held_out, expected):
    rng, texts = np.random.default_rng(0), prompts(60)
    before = {name: rng.normal(size=60) for name in ("avg", "other")}
    noise = {name: rng.normal(scale=0.5, size=60) for name in before}
    noise = {name: values - values.mean() for name, values in noise.items()}
    change = {"avg": trained, "other": held_out}
    now = {name: before[name] + change[name] + noise[name] for name in before}
    alarm.write(tmp_path, 0, before, texts)
    alarm.write(tmp_path, 2, {name: values * 0 for name, values in before.items()}, texts)
    found = alarm.fallen(tmp_path, [0, 2], now, ["other"], texts)
    assert [each.split()[0] for each in found] == ["other"] * expected
    assert alarm.fallen(tmp_path, [0], now, ["other"], texts) == []  # too early to tell
    assert alarm.fallen(tmp_path, [0, 2], now, ["other"], texts[::-1]) == []  # other prompts


def test_diversity_is_the_mean_distance_of_pictures_within_their_groups():
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (7, SIDE, SIDE, 3), dtype=np.uint8))
    group = np.array([0, 0, 0, 1, 1, 2, 2])
    images[6] = images[5]
    pairs = [(0, 1), (0, 2), (1, 2), (3, 4), (5, 6)]
    floats = [image.astype(float) / 255 for image in images]
    truth = np.mean([np.sqrt(((floats[i] - floats[j]) ** 2).mean()) for i, j in pairs])
    assert diversity(thumbnails(images), group) == pytest.approx(truth, rel=1e-12)
    order = rng.permutation(7)
    shuffled = diversity(thumbnails([images[i] for i in order]), group[order])
    assert shuffled == pytest.approx(truth, rel=1e-12)
    assert math.isnan(diversity(thumbnails(images[:2]), np.array([0, 1])))
    large = [np.kron(image, np.ones((4, 4, 1), np.uint8)) for image in images]
    assert diversity(thumbnails(large), group) == pytest.approx(truth, rel=1e-12)
    black, white = np.zeros((9, 64, 48, 3), np.uint8), np.full((9, 64, 48, 3), 255, np.uint8)
    assert diversity(thumbnails([black, white]), np.zeros(2)) == 1.0  # videos


def test_an_epoch_says_how_diverse_its_pictures_are(files):
    argv = running.arguments(files, run_name="diverse", num_epochs=1)
    alike = running.arguments(
        files, run_name="alike", num_epochs=1, sample__same_latent=True, sample__noise_level=1e-3
    )
    values = [rows(running.train(each), "epoch")[0]["diversity"] for each in (argv, alike)]
    assert 0 <= values[1] < values[0] / 2 < 0.5


# What is refused at start-up.


@pytest.mark.parametrize(
    "keys, complaint",
    [
        ({"reward_timeout": 0.0}, "config.reward_timeout=0.0: a number above 0 .*seconds"),
        ({"max_masked_fraction": 1.0}, "config.max_masked_fraction=1.0: .* at least 0 and below 1"),
        ({"on_reward_error": "ignore"}, "config.on_reward_error='ignore': one of stop, mask"),
        ({"reward_aggregation": "mean"}, "one of sum, gdpo"),
        ({"reward_encoding": "png"}, "one of raw, jpeg"),
        ({"hacking_alarm": "warn"}, "it watches the held-out rewards, and there are none"),
        ({"eval_reward_fn": "('shapes',)"}, "'shapes' is trained"),
        ({"eval_reward_fn": "('shaps',)"}, "Did you mean 'shapes'"),
        ({"eval_reward_fn": "('unifiedreward_pairs',)"}, "evaluations have no groups"),
        ({"dataset": "dataset/ocr"}, "reward 'shapes': metadata row 0 has no 'include'"),
        ({"reward_token_file": "no", "reward_urls": {"shapes": ["http://a:1"]}}, "can't be read"),
    ],
)
def test_a_mistake_is_named_before_anything_loads(keys, complaint):
    with pytest.raises(ValueError, match=complaint):
        preflight.check(config_of(**keys), 1)


def test_a_server_that_is_down_is_named_before_anything_loads():
    url = f"http://127.0.0.1:{serving.free_port()}"
    with pytest.raises(ValueError, match=f"server of reward 'shapes' at {url} does not answer"):
        preflight.check(config_of(reward_urls={"shapes": [url]}), 1)


def test_a_reward_that_only_its_server_knows_may_be_trained():
    with serve(jpeg_incompressibility, name="my_own") as server:
        preflight.check(
            config_of(reward_fn={"my_own": 1.0}, reward_urls={"my_own": [server.url]}), 1
        )
    with pytest.raises(ValueError, match="there is no reward 'my_own'"):
        preflight.check(config_of(reward_fn={"my_own": 1.0}), 1)
