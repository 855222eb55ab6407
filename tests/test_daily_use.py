"""Every command of README's "Daily use" runs as it stands on the testbed, where NAME is a run."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from diffusers import StableDiffusion3Pipeline
from PIL import Image

ROOT = Path(__file__).parent.parent
NAME = "first"
LAST = f"logs/{NAME}/checkpoints/checkpoint-2"
NOT_RUN = {"test"}  # it would run this file


def read_rows() -> dict[str, str]:
    """The table of "Daily use": what one wants to do, and the command or arguments for it."""
    section = (ROOT / "README.md").read_text().split("## Daily use")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| `([^|]+)` \|", section, re.MULTILINE)
    return {label: command.replace("NAME", NAME) for label, command in rows}


ROWS = read_rows()
tested = []


def row(label: str, slow: bool = True):
    """Mark the test of a row."""
    tested.append(label)
    return pytest.mark.slow if slow else lambda test: test


class Desk:
    """A folder that looks like the project's; what commands write stays in it."""

    def __init__(self, folder: Path):
        self.folder, self._done = folder, {}
        for entry in ROOT.iterdir():
            if entry.name not in {"logs", ".git"}:
                (folder / entry.name).symlink_to(entry)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def command(self, label: str) -> str:
        command = ROWS[label]
        return f"{ROWS['train']} {command}" if command.startswith("--config") else command

    def run(self, command: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=self.env, capture_output=True, text=True
        )

    def do(self, label: str) -> str:
        """Run a row's command, once; returns what it printed."""
        if label not in self._done:
            done = self.run(self.command(label))
            assert done.returncode == 0, f"{done.args[-1]}\n{done.stdout}{done.stderr}"
            self._done[label] = done.stdout
        return self._done[label]

    def rows(self, run: str, kind: str) -> list[dict]:
        lines = (self.folder / "logs" / run / "metrics.jsonl").read_text().splitlines()
        return [r for r in map(json.loads, lines) if r["kind"] == kind]

    def config(self, run: str) -> dict:
        return json.loads((self.folder / "logs" / run / "config.json").read_text())


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Desk:
    return Desk(tmp_path_factory.mktemp("desk"))


def test_every_row_is_tested_but_those_of_testing():
    assert set(tested) == set(ROWS) - NOT_RUN and len(tested) == len(set(tested)) == 17


@row("train", slow=False)
def test_train(desk):
    printed = desk.do("train")
    assert "step 0 -> 2" in printed and "report.html shows it" in printed
    assert (desk.folder / LAST / "transformer" / "config.json").is_file()
    assert [r["epoch"] for r in desk.rows(NAME, "epoch")] == [0, 1]


@row("continue a run")
def test_continue(desk):
    desk.do("train")
    desk.do("continue a run")
    assert [r["epoch"] for r in desk.rows(NAME, "epoch")] == [0, 1, 2, 3]
    launches = json.loads((desk.folder / "logs" / NAME / "launches.json").read_text())
    assert [launch["resumed_from"] for launch in launches] == [None, "checkpoint-2"]


@row("stop a run")
def test_stop(desk):
    more = "--config.run_name=stopped --config.num_epochs=100000"
    with (desk.folder / "errors").open("w") as errors:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {ROWS['train']} {more}"],
            cwd=desk.folder,
            env=desk.env,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        first = next((line for line in process.stdout if line.startswith("epoch 1:")), None)
        assert first and desk.run(ROWS["stop a run"].replace("PID", str(process.pid)))
        process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM
    finished = desk.rows("stopped", "epoch")[-1]["epoch"] + 1
    saved = desk.folder / "logs" / "stopped" / "checkpoints" / f"checkpoint-{finished}"
    assert (saved / "trainer.json").is_file()


@row("run the control")
def test_control(desk):
    desk.do("run the control")
    assert desk.config(f"{NAME}-control")["train"]["shuffle_advantages"]
    assert len(desk.rows(f"{NAME}-control", "epoch")) == 2


@row("see a run")
def test_see(desk):
    desk.do("train")
    desk.do("run the control")
    assert desk.do("see a run").strip() == f"logs/{NAME}/report.html"
    text = (desk.folder / "logs" / NAME / "report.html").read_text()
    assert f"<td>{NAME}-control</td>" in text


@row("use other prompts")
def test_prompts(desk):
    desk.do("use other prompts")
    layout = desk.folder / f"logs/{NAME}-ocr/images/eval.json"
    texts = json.loads(layout.read_text())["prompts"]
    assert set(texts) <= set((ROOT / "dataset/ocr/test.txt").read_text().splitlines())


@row("train a LoRA")
def test_lora(desk):
    desk.do("train a LoRA")
    lora = desk.folder / f"logs/{NAME}-lora/checkpoints/checkpoint-2/lora"
    assert (lora / "pytorch_lora_weights.safetensors").is_file()


@row("use the result")
def test_use(desk):
    desk.do("train a LoRA")
    pipe = StableDiffusion3Pipeline.from_pretrained(ROOT / "scripts/testbed/base")
    line = ROWS["use the result"].replace("logs/", f"{desk.folder}/logs/")
    exec(line, {"pipe": pipe})  # as a user types it
    assert pipe.get_active_adapters() == ["default_0"]


@row("run on two processes")
def test_two_processes(desk):
    assert "2 rank(s)" in desk.do("run on two processes")


@row("run under DeepSpeed")
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="no deepspeed: pip install deepspeed")
def test_deepspeed(desk):
    assert "2 rank(s)" in desk.do("run under DeepSpeed")


@row("evaluate or compare checkpoints")
def test_evaluate(desk):
    desk.do("train")
    assert "rows higher" in desk.do("evaluate or compare checkpoints")
    with (desk.folder / f"logs/{NAME}-test/pairwise.csv").open() as file:
        assert {"shapes", "shapes_strict"} <= {line["score"] for line in csv.DictReader(file)}


@row("score images that exist")
def test_score(desk):
    desk.do("train")
    desk.do("evaluate or compare checkpoints")
    printed = desk.do("score images that exist")
    with (desk.folder / f"logs/{NAME}-test/second/scores.csv").open() as file:
        scores = [float(line["shapes_strict"]) for line in csv.DictReader(file)]
    assert f"{sum(scores) / len(scores):.3f}" in printed and "20 images" in printed


@row("draw with the stock pipeline")
def test_draw(desk):
    desk.do("train")
    desk.do("draw with the stock pipeline")
    assert Image.open(desk.folder / f"logs/{NAME}-images/0000.png").size == (32, 32)


@row("check a model against its stock pipeline")
def test_verify(desk):
    assert desk.do("check a model against its stock pipeline").endswith("all passed\n")


@row("compare kernels and noise levels")
def test_kernels(desk):
    desk.do("compare kernels and noise levels")
    assert Image.open(desk.folder / "logs/kernels.png").width > 4 * 128


@row("log to wandb")
@pytest.mark.skipif(find_spec("wandb") is None, reason="no wandb: pip install wandb")
def test_wandb(desk):
    desk.do("log to wandb")
    assert (desk.folder / f"logs/{NAME}-wandb/wandb").is_dir()


@row("see the traceback behind an error")
def test_traceback(desk):
    wrong = f"{ROWS['train']} --config.sead=1"
    plain, full = desk.run(wrong), desk.run(f"{ROWS['see the traceback behind an error']} {wrong}")
    assert plain.returncode == full.returncode == 1
    assert "Did you mean --config.seed?" in plain.stderr and "Traceback" not in plain.stderr
    assert "Traceback (most recent call last)" in full.stderr
