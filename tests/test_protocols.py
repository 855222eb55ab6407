"""A protocol pins how a benchmark is run; evaluations go on after a kill, and are paired."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import running
from waiting import HANG_S

from config.base import base
from flow_grpo.diffusers_patch.registry import FAMILIES
from flow_grpo.evaluation import protocol as protocols
from flow_grpo.evaluation.intervals import interval
from flow_grpo.evaluation.kept import Kept
from flow_grpo.prompts import read
from flow_grpo.rewards import loading
from flow_grpo.rewards.registry import REWARDS
from scripts import evaluate as script

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in protocols.FOLDER.glob("*.toml"))
COUNTS = {  # rows and pictures a prompt, as the benchmarks' papers have them
    "geneval": (2212, 4),
    "geneval2": (800, 1),
    "dpg": (4260, 4),
    "parti": (1632, 1),
    "drawbench": (1000, 5),
    "ocr": (1000, 1),
    "counting_edit": (36, 1),
    "shapes": (400, 1),
}
PROTOCOL = """
[prompts]
dataset = "{folder}/bench"
rows = 9
per_prompt = 1
sha256 = {{}}
others = true

[config]
seed = 5
eval_split = "test"
eval_max_samples = 0
resolution = 32
height = 32
width = 32
num_frames = 1
"sample.eval_sizes" = []
"sample.eval_num_steps" = 2
"sample.eval_guidance_scale" = 3.0
"sample.guidance_interval" = [0.0, 1.0]
"sample.clean_grid" = false
"sample.test_batch_size" = 1
eval_reward_fn = []
reward_fn = {{ "counted:brightness" = 1.0 }}

[guidance]
FluxPipeline = 2.0

[result]
score = "counted:brightness"
over = "all"
times = 100
judge = "the mean"
resamples = 2000

[[published]]
model = "someone's | model"
value = "12"
settings = "guidance 1"
source = "a paper"
"""
REWARD = """
import os, signal
from pathlib import Path

def brightness(images, prompts):
    folder = Path(os.environ["COUNTED"])
    with (folder / "scored.txt").open("a") as file:
        file.writelines(prompt + "\\n" for prompt in prompts)
    if "cat" in prompts[0] and (folder / "stop").exists():
        raise RuntimeError("out of order")
    if "cat" in prompts[0] and (folder / "kill").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return [image.mean() / 255 for image in images]
"""
PROMPTS = ["a red apple", "a blue cube", "two cubes", "a sign", "a cat", "a green apple"]
PROMPTS += ["three apples", "make it red", "that sign"]


@pytest.fixture(scope="module")
def bench(files):
    (files / "bench").mkdir()
    rows = [{"prompt": text, "tag": text[:3]} for text in PROMPTS]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (files / "bench" / "test_metadata.jsonl").write_text(lines)
    (files / "mine.toml").write_text(PROTOCOL.format(folder=files))
    (files / "counted.py").write_text(REWARD)
    return files


@pytest.fixture
def evaluate(bench, tmp_path, monkeypatch):
    """Return evaluate(name, *options, **keys) -> its folder, by the protocol of `bench`."""
    monkeypatch.setenv("COUNTED", str(tmp_path))
    monkeypatch.syspath_prepend(str(bench))
    monkeypatch.setattr(script.entry, "leave", sys.exit)  # not out of pytest

    def run(name, *options, protocol="mine.toml", **keys):
        with running.fresh_process():
            script.main(command(bench, tmp_path / name, protocol, *options, **keys))
        return tmp_path / name

    return run


def command(bench, out, protocol, *options, **keys) -> list[str]:
    """The model and how it is loaded; all else is the protocol's."""
    keys = {"max_sequence_length": 16, "pretrained.model": bench / "sd3"} | keys
    named = [f"--config.{key.replace('__', '.')}={value}" for key, value in keys.items()]
    start = ["evaluate.py", "--config=config/testbed.py:shapes_sd3", f"--out={out}"]
    return [*start, f"--protocol={bench / protocol}", *map(str, options), *named]


def scored(tmp_path) -> list[str]:
    return (tmp_path / "scored.txt").read_text().splitlines()


def same(one: Path, other: Path) -> None:
    names = {path.name for path in one.iterdir()} - {"evaluation.json"}
    assert names == {"scores.csv", "table.csv", "sheet.png", "protocol.md"}
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("name", NAMES)
def test_a_protocol_s_file_is_complete(name):
    found = protocols.load(name)
    assert (found.rows, found.per_prompt) == COUNTS[name]
    assert set(found.guidance) <= set(FAMILIES) and found.judge
    assert set(found.config["reward_fn"]) <= set(REWARDS)
    assert found.config["reward_fn"][found.score] == 1
    assert all(all(row) for row in found.published)
    config = base()
    found.pin(config, (), "StableDiffusion3Pipeline")
    assert config.height == found.config["height"] and config.dataset == found.dataset
    assert loading.settings(config)["vlm_model"] == "Qwen/Qwen3-VL-8B-Instruct"
    folder = ROOT / found.dataset
    if any(folder.glob("test*")):  # what this repository has
        assert protocols.checksum(read(str(folder), "test")) in found.sha256
        found.check(read(str(folder), "test"))
    else:
        assert (folder / "convert.py").is_file() and found.others


def test_two_evaluations_are_equal_and_state_what_was_done(evaluate, capsys):
    one, two = evaluate("one"), evaluate("two")
    same(one, two)
    with (one / "scores.csv").open() as file:
        values = np.array([float(row["avg"]) for row in csv.DictReader(file)])
    low, high = interval(100 * values, PROMPTS)
    stated = (one / "protocol.md").read_text()
    assert f"| {100 * values.mean():.2f} [{low:.2f}, {high:.2f}] |" in stated
    assert "| 32 x 32 | 2 | 3 | the mean | 5 | no | 16 |" in stated
    assert "| someone's \\| model | 12 | guidance 1 | a paper |" in stated
    assert stated in capsys.readouterr().out
    made = json.loads((one / "evaluation.json").read_text())
    assert made["protocol"] == "mine" and made["prompts"].endswith("not known to the protocol)")
    assert made["config"]["seed"] == 5 and made["config"]["sample"]["eval_num_steps"] == 2


def test_an_evaluation_that_was_stopped_goes_on(evaluate, tmp_path):
    whole = evaluate("whole")
    assert scored(tmp_path) == PROMPTS
    (tmp_path / "scored.txt").unlink()
    (tmp_path / "stop").touch()
    with pytest.raises(SystemExit):
        evaluate("cut")
    seen = scored(tmp_path)
    assert "a cat" in seen and "that sign" not in seen
    (tmp_path / "stop").unlink()
    (tmp_path / "scored.txt").unlink()
    with pytest.raises(SystemExit, match="is not empty"):
        evaluate("cut")
    with pytest.raises(SystemExit, match="holds an evaluation with another config"):
        evaluate("cut", "--resume", max_sequence_length=15)
    same(whole, evaluate("cut", "--resume"))
    with pytest.raises(SystemExit, match="--resume: the evaluation in --out=.*came to its end"):
        evaluate("cut", "--resume")
    again = scored(tmp_path)
    assert again == PROMPTS[-len(again) :] and "a cat" in again and len(again) < len(PROMPTS)


@pytest.mark.slow
def test_one_that_was_killed_on_two_processes_goes_on_on_one(evaluate, bench, tmp_path):
    whole = evaluate("whole")
    launch = ["--config_file", "scripts/accelerate_configs/multi_gpu.yaml", "--num_processes", "2"]

    def on_two(name, *options):
        argv = command(bench, tmp_path / name, "mine.toml", *options)[1:]
        start = [sys.executable, "-m", "accelerate.commands.launch", *launch, "scripts/evaluate.py"]
        places = {"PYTHONPATH": f"{bench}:{ROOT}", "COUNTED": str(tmp_path)}
        return subprocess.run(
            [*start, *argv],
            cwd=ROOT,
            env=os.environ | places | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
            timeout=HANG_S,
        )

    (tmp_path / "kill").touch()
    assert on_two("cut").returncode != 0
    (tmp_path / "kill").unlink()
    assert not (tmp_path / "cut" / "scores.csv").exists()
    same(whole, evaluate("cut", "--resume"))
    done = on_two("two")
    assert done.returncode == 0, done.stderr
    same(whole, tmp_path / "two")


DEVIATIONS = {
    "size": {"height": 64},
    "resolution": {"resolution": 64},
    "steps": {"sample.eval_num_steps": 3},
    "guidance": {"sample.eval_guidance_scale": 1.0},
    "seed": {"seed": 6},
    "reward": {"reward_fn": {"counted:brightness": 2.0}},
    "a reward's weight": {"reward_fn.shapes": 2.0},
    "held out": {"eval_reward_fn": "jpeg_compressibility"},
    "fewer": {"eval_max_samples": 2},
}


@pytest.mark.parametrize("case", DEVIATIONS)
def test_a_deviation_is_refused_before_weights_load(evaluate, tmp_path, case):
    ((key, value),) = DEVIATIONS[case].items()
    named = key.removesuffix(".shapes")  # of a dict that is pinned whole
    with pytest.raises(SystemExit, match=rf"--config\.{named}=.*--protocol=mine pins"):
        evaluate("out", **{key: value})
    assert not (tmp_path / "out").exists()


def test_what_is_pinned_may_be_said(evaluate, bench, tmp_path):
    argv = command(bench, tmp_path / "out", "mine.toml", height=32, seed=5)
    job = script.read(argv)
    job.claim.release()
    assert job.config.sample.eval_num_steps == 2


def test_guidance_follows_the_pipelines_class(bench):
    config = base()
    protocols.load(str(bench / "mine.toml")).pin(config, (), "FluxPipeline")
    assert config.sample.eval_guidance_scale == 2


def test_another_judge_is_refused():
    found, config = protocols.load("geneval2"), base()
    for path in ("/models/Qwen3-VL-8B-Instruct", "Qwen/Qwen3-VL-8B-Instruct", "/s/0c351dd01e"):
        config.rewards.vlm = path
        if path.startswith("/s"):
            with pytest.raises(ValueError, match="pins Qwen/Qwen3-VL-8B-Instruct at 0c351dd"):
                found.pin(config, (), "FluxPipeline")
        else:
            found.pin(config, (), "FluxPipeline")


def test_other_prompts_are_refused(bench):
    found = protocols.load("shapes")
    prompts = read(str(ROOT / "dataset/shapes"), "test")
    with pytest.raises(ValueError, match="has 400 rows, 1 of each prompt; the data set has 399"):
        found.check(prompts[1:])
    with pytest.raises(ValueError, match="checksum is [0-9a-f]{64}; those of dataset/shapes have"):
        found.check(prompts[::-1])


BROKEN = {
    "a key that is none": (
        '"sample.clean_grid"',
        '"sample.celan_grid"',
        "celan_grid=False: it is no key",
    ),
    "a key that is missing": ("seed = 5", "", r"\[config\] seed"),
    "a value out of range": ("height = 32", "height = 0", r"height=0: .* of at least 1"),
    "a part's key": ("rows = 9", "rowes = 9", r"\[prompts\] needs dataset, rows"),
    "no TOML": ("[result]", "[result", "mine.toml: "),
    "another interval": ("resamples = 2000", "resamples = 100", "resamples is 2000"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_protocol_s_mistake_is_named(tmp_path, case):
    old, new, message = BROKEN[case]
    (tmp_path / "mine.toml").write_text(PROTOCOL.format(folder="x").replace(old, new))
    with pytest.raises(ValueError, match=message):
        protocols.load(str(tmp_path / "mine.toml"))


def test_a_protocol_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="there are counting_edit, .*Did you mean 'geneval2'"):
        protocols.load("genval2")


def test_an_earlier_evaluation_is_compared_row_by_row(evaluate, bench, tmp_path):
    one = evaluate("one")
    two = evaluate("two", "--checkpoint", bench / "lora", "--compare", one)
    rows = []
    for folder in (one, two):
        with (folder / "scores.csv").open() as file:
            rows.append(np.array([float(row["avg"]) for row in csv.DictReader(file)]))
    with (two / "compared.csv").open() as file:
        found = next(
            row for row in csv.DictReader(file) if (row["score"], row["tag"]) == ("avg", "")
        )
    difference = rows[1] - rows[0]
    assert float(found["difference"]) == pytest.approx(difference.mean(), abs=1e-12)
    assert int(found["wins"]) == (difference > 0).sum() > 0
    low, high = interval(difference, PROMPTS)
    assert (float(found["low"]), float(found["high"])) == pytest.approx((low, high))
    text = (bench / "mine.toml").read_text().replace("seed = 5", "seed = 6")
    (bench / "other.toml").write_text(text)
    with pytest.raises(SystemExit, match=r"evaluated with another config\.seed: its rows can't"):
        evaluate("three", "--compare", one, protocol="other.toml")
    with pytest.raises(SystemExit, match="no folder of an evaluation"):
        evaluate("three", "--compare", tmp_path)


def test_a_damaged_part_is_named_and_nothing_in_it_runs(tmp_path):
    kept = Kept(tmp_path, {"seed": 1})
    kept.add([3, 1], {"a": np.array([0.5, np.nan])}, {3: np.zeros((2, 2, 3), np.uint8)})
    kept.add([2], {"b": np.array([1.0])}, {})
    columns, images = Kept(tmp_path, {"seed": 1}).result(4)
    np.testing.assert_array_equal(columns["a"], [np.nan, np.nan, np.nan, 0.5])
    np.testing.assert_array_equal(columns["b"], [np.nan, np.nan, 1, np.nan])
    assert [*images] == [3] and Kept(tmp_path, {"seed": 1}).rows == {1, 2, 3}
    part = tmp_path / "unfinished" / "00000002.npz"
    part.write_bytes(part.read_bytes()[:-40])
    with pytest.raises(ValueError, match="00000002.npz is damaged"):
        Kept(tmp_path, {"seed": 1})
    np.savez(part, rows=np.array([object()], dtype=object))
    with pytest.raises(ValueError, match="00000002.npz is damaged"):
        Kept(tmp_path, {"seed": 1})
