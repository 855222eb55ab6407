"""Whole runs whose rewards are scored by a server, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import running
import serving
import torch
from waiting import wait_until

from flow_grpo.report.output import read_metrics
from tests.test_clip_rewards import folder as clip_folder  # noqa: F401
from tests.test_geneval import folder as detector_folder  # noqa: F401

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def train(folder: Path, name: str, url: str, *more: str) -> subprocess.Popen:
    """Train the testbed in a process of its own, its images scored by a server."""
    small = {
        "num_epochs": 3,
        "eval_max_samples": 20,
        "sample.train_batch_size": 48,
        "sample.num_batches_per_epoch": 2,
        "train.gradient_accumulation_steps": 1,
        "logdir": folder,
        "run_name": name,
        "tracker": "none",
        "save_freq": 1,
        "reward_urls": {"shapes": [url]},
    }
    flags = [f"--config.{key}={value}" for key, value in small.items()]
    command = [sys.executable, "scripts/train_sd3.py", "--config=config/testbed.py:shapes_sd3"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *flags, *more], cwd=ROOT, env=environment, **pipes)


def test_the_testbed_trains_with_its_checker_behind_a_server(tmp_path):
    with serving.started("shapes") as url:
        process = train(tmp_path, "http", url)
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    epochs = read_metrics(tmp_path / "http", "epoch")
    assert len(epochs) == 3
    assert all(row["reward/zero_std_fraction"] <= 0.5 for row in epochs)
    weights = [
        running.checkpoint_weights(tmp_path / f"http/checkpoints/checkpoint-{n}") for n in (2, 6)
    ]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def wait_for(text: str, folder: Path, process: subprocess.Popen) -> None:
    """Wait until a run's metrics have a text."""
    metrics = folder / "metrics.jsonl"

    def alive() -> None:
        assert process.poll() is None, process.communicate()[0]

    wait_until(lambda: metrics.exists() and text in metrics.read_text(), alive)


def test_a_run_outlives_a_server_that_is_killed_and_comes_back_and_stops_if_it_does_not(tmp_path):
    url = f"http://127.0.0.1:{(port := serving.free_port())}"
    servers = [serving.start("shapes", port)]
    try:
        process = train(tmp_path, "back", url)
        wait_for('"kind": "eval"', tmp_path / "back", process)
        servers[-1].kill()
        servers[-1].wait()
        servers.append(serving.start("shapes", port))
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
        assert len(read_metrics(tmp_path / "back", "epoch")) == 3

        endless = "--config.num_epochs=1000"  # it has not ended when the server does
        process = train(tmp_path, "gone", url, "--config.reward_timeout=60", endless)
        wait_for('"kind": "epoch"', tmp_path / "gone", process)
        servers[-1].kill()
        servers[-1].wait()
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 1, output
        assert f"reward 'shapes' failed: {url}: no scores" in output
        assert "Traceback" not in output and "--config.resume_from=latest" in output
        servers.append(serving.start("shapes", port))
        more = f"--config.num_epochs={max(3, len(read_metrics(tmp_path / 'gone', 'epoch')) + 1)}"
        process = train(tmp_path, "gone", url, "--config.resume_from=latest", more)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
    finally:
        for server in servers:
            server.kill()
    ours, theirs = (read_metrics(tmp_path / name, "epoch") for name in ("gone", "back"))
    assert [row["reward/avg"] for row in ours[:3]] == [row["reward/avg"] for row in theirs]


def write_prompts(folder: Path, name: str) -> Path:
    """Copy a few rows of dataset/<name>, of GenEval's one of each tag, as a data set of its own."""
    folder.mkdir()
    if name == "geneval":
        lines = (ROOT / "dataset/geneval/test_metadata.jsonl").read_text().splitlines()
        chosen = {json.loads(line)["tag"]: line for line in lines}
        file, lines = "{}_metadata.jsonl", list(chosen.values())
    else:
        file, lines = "{}.txt", (ROOT / "dataset/ocr/test.txt").read_text().splitlines()[:6]
    for split in ("train", "test"):
        (folder / file.format(split)).write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("name", ["geneval", "ocr"])
def test_a_run_is_scored_by_a_server_of(name, files, clip_folder, detector_folder, tmp_path):  # noqa: F811
    """The models are random, or see images of noise: it is the way that is tested."""
    options = {"geneval_detector": detector_folder, "clip": clip_folder, "ocr_processes": 1}
    flags = [f"--set={key}={value}" for key, value in options.items()]
    with serving.started(name, *flags) as url:
        argv = running.arguments(
            files,
            dataset=write_prompts(tmp_path / "prompts", name),
            logdir=tmp_path,
            run_name="run",
            reward_fn={name: 1.0},
            reward_urls={name: [url]},
        )
        done = subprocess.run(
            [sys.executable, "scripts/train_sd3.py", *argv[1:]],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        counted = httpx.get(f"{url}/metrics").text
        assert done.returncode == 0, done.stdout + done.stderr
    assert "reward_pictures_total 48\n" in counted, counted  # 2 x 16 trained, 2 x 8 evaluated
    epochs = read_metrics(tmp_path / "run", "epoch")
    assert len(epochs) == 2
    assert all(0 <= row[f"reward/{name}"] <= 1 and row["reward/missing"] == 0 for row in epochs)
    last = read_metrics(tmp_path / "run", "eval")[-1]
    if name == "geneval":
        assert {"geneval_strict/counting", "geneval_official/mean_of_tags"} <= set(last)
