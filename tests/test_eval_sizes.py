"""Evaluations at another size than training's, and at several."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import running
import tiny

from config.base import base
from flow_grpo.evaluation.evaluate import sizes
from flow_grpo.records import Size
from scripts import evaluate as script

SCORE = "jpeg_incompressibility"


def rows(folder: Path, kind: str) -> list[dict]:
    return [row for row in running.metrics(folder) if row["kind"] == kind]


def test_a_run_is_evaluated_at_other_sizes_and_trains_as_it_would(files, tmp_path):
    usual = {"logdir": tmp_path, "num_epochs": 1, "sample__eval_guidance_scale": 3.0}
    changed = {"sample__eval_sizes": ("64x32", "32x32")}
    plain = running.train(running.arguments(files, run_name="plain", **usual))
    other = running.train(running.arguments(files, run_name="other", **usual, **changed))
    assert rows(plain.folder, "update") == rows(other.folder, "update")
    for before, after in zip(rows(plain.folder, "eval"), rows(other.folder, "eval"), strict=True):
        for name in (SCORE, f"{SCORE}_low", f"{SCORE}_high", "avg"):
            stem = "avg" if name == "avg" else SCORE
            assert after[name.replace(stem, f"{stem}@32x32")] == before[name]  # training's size
        assert after[SCORE] != before[SCORE]
    images = {path.name for path in (other.folder / "images").iterdir()}
    assert {"eval-000000.png", "eval-000000@32x32.png", "eval-000002.png"} <= images
    out = tmp_path / "out"
    keys = usual | {"height": 64, "width": 32}
    with running.fresh_process():
        argv = running.arguments(files, **keys)[1:]
        script.main(["evaluate.py", f"--out={out}", *argv])
    with (out / "table.csv").open() as file:
        found = {row["score"]: float(row["mean"]) for row in csv.DictReader(file)}
    assert found[SCORE] == rows(other.folder, "eval")[0][SCORE]


def test_the_script_draws_at_that_size_too(files, tmp_path):
    with running.fresh_process():
        more = running.arguments(files, sample__eval_sizes=("32x64",))[1:]
        script.main(["evaluate.py", f"--out={tmp_path / 'out'}", "--write-images", *more])
    image = tmp_path / "out" / "images" / "000000.png"
    assert script.results.Image.open(image).size == (64, 32)  # width, height
    with pytest.raises(ValueError, match="this script draws at one size"):
        more = running.arguments(files, sample__eval_sizes=("32x64", "32x32"))[1:]
        script.read(["evaluate.py", f"--out={tmp_path / 'two'}", *more])


def test_a_video_may_have_other_frames(tmp_path, files):
    tiny.save("wan", tmp_path / "wan")
    keys = {"pretrained__model": tmp_path / "wan", "num_frames": 5, "logdir": tmp_path}
    keys |= {"sample__eval_sizes": ("32x32x9",), "mixed_precision": "no"}
    with running.fresh_process():
        more = running.arguments(files, **keys)[1:]
        script.main(["evaluate.py", f"--out={tmp_path / 'out'}", "--write-images", *more])
    assert script.results.Image.open(tmp_path / "out" / "images" / "000000.png").n_frames == 9


BAD = {
    "64": "'64': a size such as 1024x768 or 480x832x81 is needed",
    "64x": "'64x': a size",
    "0x64": "'0x64': a size",
    "64x64x4x4": "a size such as",
    "30x32": r"config.sample.eval_sizes=30: this model draws sides that are multiples of 16",
}


@pytest.mark.parametrize("size", BAD)
def test_a_size_that_is_none_is_refused_before_weights_load(files, size):
    with pytest.raises(ValueError, match=BAD[size]):
        running.prepare(running.arguments(files, sample__eval_sizes=(size,)))


def test_a_size_may_leave_the_frames_to_training():
    config = base()
    config.num_frames, config.sample.eval_sizes = 5, ("8x16", "8x16x9")
    assert sizes(config) == [Size(8, 16, 5), Size(8, 16, 9)]
    config.sample.eval_sizes = ("8x16", "8x16x5")
    with pytest.raises(ValueError, match="one of them is there twice"):
        sizes(config)
