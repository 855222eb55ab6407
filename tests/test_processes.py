"""What needs real processes: several ranks, signals, kills."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import running
import torch
from safetensors.torch import load_file, save_file
from waiting import HANG_S, wait_until

from flow_grpo.launch import entry
from flow_grpo.report.output import read_metrics
from flow_grpo.training import collect, folders

ROOT = Path(__file__).parent.parent


def start(
    files: Path, *launcher: str, env: dict | None = None, script: str = "scripts/train_sd3.py", **kw
) -> subprocess.Popen:
    command = [*launcher, script, *running.arguments(files, **kw)[1:]]
    if not launcher:
        command = [sys.executable, *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(HANG_S)  # until a launcher kills its ranks
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    output, _ = process.communicate(timeout=HANG_S)
    assert process.returncode == status, output
    return output


def launcher(config: str, num_processes: int, *more: str) -> list[str]:
    file = f"scripts/accelerate_configs/{config}.yaml"
    module = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*module, "--config_file", file, "--num_processes", str(num_processes), *more]


def wait_for(condition, process: subprocess.Popen) -> None:
    def alive() -> None:
        assert process.poll() is None, process.communicate()[0]

    wait_until(condition, alive)


def num_rows(folder: Path, kind: str) -> int:
    return len(read_metrics(folder, kind)) if (folder / "metrics.jsonl").exists() else 0


def close(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        one[key] == other[key] or abs(one[key] - other[key]) <= 1e-5 * max(1, abs(one[key]))
        for key in one
    )


@pytest.mark.slow
def test_two_ranks_make_the_epoch_of_one_with_twice_the_batches(files, tmp_path, monkeypatch):
    settings = {"num_epochs": 1, "train__learning_rate": 1e-3, "train__beta": 0.1}
    settings |= running.lora(files) | {"train__ema": True, "train__ema_update_every": 1}
    settings |= {"sample__num_image_per_prompt": 32, "sample__global_std": True}  # over both ranks
    folders_of = {name: tmp_path / name for name in ("one", "two")}
    for folder in folders_of.values():
        folder.mkdir()
    more = {"sample__num_batches_per_epoch": 8, "train__gradient_accumulation_steps": 4}
    one = running.prepare(running.arguments(files, run_name="one", **settings, **more))
    monkeypatch.setattr(collect, "weigh", collect.weigh)  # recording ends with this test
    running.record_rollouts(folders_of["one"], 0)
    entry.execute(one)
    both = start(
        files,
        *launcher("multi_gpu", 2),
        env={"ACCELERATE_USE_CPU": "true", "MODE": str(folders_of["two"])},
        script="tests/running.py",
        run_name="two",
        encoders="precompute",  # each rank its share
        encoder_cache=tmp_path / "cache",
        **settings,
    )
    assert "2 rank(s)" in finish(both)
    assert len(list((tmp_path / "cache").glob("*/*.safetensors"))) == len(running.PROMPTS)

    whole = load_file(folders_of["one"] / "0-0")
    halves = [load_file(folders_of["two"] / f"{rank}-0") for rank in (0, 1)]
    for key, value in whole.items():
        assert torch.equal(torch.cat([half[key] for half in halves]), value), key
    assert whole["advantages"].unique().numel() > 8
    first, second = (running.metrics(files / "logs" / name)[:3] for name in ("one", "two"))
    assert [row["kind"] for row in first] == ["look", "eval", "update"]
    assert first[:2] == second[:2] and close(first[2], second[2])
    assert first[2]["kl"] > 0
    ours, theirs = (running.weights(folder) for folder in (one.folder, files / "logs" / "two"))
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_deepspeed_zero2_trains_and_skips_like_one_process_and_resumes_bit_for_bit(files):
    settings = running.lora(files) | {"train__ema": True, "train__ema_update_every": 1}
    one = running.prepare(
        running.arguments(
            files,
            run_name="whole",
            sample__num_batches_per_epoch=8,
            train__gradient_accumulation_steps=4,
            num_epochs=1,
            **settings,
        )
    )
    running.break_losses(one, {0})
    entry.execute(one)
    zero2 = launcher("deepspeed_zero2", 2, "--mixed_precision", "no")
    broken = {"script": "tests/running.py", "env": {"MODE": "break"}}
    finish(start(files, *zero2, **broken, run_name="zero2", **settings))
    folder = files / "logs" / "zero2"
    rows = (running.metrics(each)[:3] for each in (folder, one.folder))
    for ours, theirs in zip(*rows, strict=True):
        assert close(ours, theirs), (ours, theirs)
    assert read_metrics(folder, "epoch")[0]["skipped_updates"] == 1

    after_first = folder / "checkpoints" / "checkpoint-1"
    finish(start(files, *zero2, run_name="resumed", resume_from=after_first, **settings))
    parts = [f"{kind}-{rank}.safetensors" for kind in ("weights", "optimizer") for rank in (0, 1)]
    for name in (*parts, "lora/pytorch_lora_weights.safetensors"):
        last = f"checkpoints/checkpoint-3/{name}"
        ours, theirs = load_file(files / "logs" / "resumed" / last), load_file(folder / last)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_run_killed_in_its_third_epoch_continues_bit_for_bit(files):
    whole = running.train(running.arguments(files, run_name="unkilled", num_epochs=4))
    folder = files / "logs" / "killed"
    mode = {"script": "tests/running.py", "env": {"MODE": "die after update 5"}}  # of 2 an epoch
    finish(start(files, **mode, run_name="killed", num_epochs=4), -signal.SIGKILL)
    assert num_rows(folder, "update") == 5 and num_rows(folder, "epoch") == 2
    resumed = running.train(
        running.arguments(files, run_name="killed", num_epochs=4, resume_from="latest")
    )
    assert running.metrics(folder) == running.metrics(whole.folder)
    for (name, ours), (_, theirs) in zip(
        running.trained_parameters(resumed), running.trained_parameters(whole), strict=True
    ):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_leaves_with_its_status(files, number):
    name = f"signal{int(number)}"
    folder = files / "logs" / name
    process = start(files, run_name=name, num_epochs=1000, save_freq=1000)
    wait_for(lambda: num_rows(folder, "epoch") >= 1, process)
    process.send_signal(number)
    assert f"stopped by {number.name}" in finish(process, 128 + number)
    (saved,) = folders.checkpoints(folder)
    assert folders.read(saved)["epoch"] >= 1


@pytest.mark.parametrize(
    "signalled",
    ["launcher killed", pytest.param("all told to end", marks=pytest.mark.slow)],
)
def test_ranks_save_when_their_launcher_ends_or_all_are_signalled(files, signalled):
    name = signalled.replace(" ", "-")
    folder = files / "logs" / name
    process = start(
        files,
        *launcher("multi_gpu", 2),
        env={"ACCELERATE_USE_CPU": "true", "MODE": "patient"},
        script="tests/running.py",
        run_name=name,
        num_epochs=1000,
        save_freq=1000,
    )
    wait_for(lambda: num_rows(folder, "epoch") >= 1, process)
    if signalled == "launcher killed":
        process.kill()
    else:  # as a cluster's scheduler does; the launcher passes the signal on once more
        os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=HANG_S)  # until the ranks have closed its pipe, too: they ended
    (saved,) = folders.checkpoints(folder)
    assert num_rows(folder, "epoch") == folders.read(saved)["epoch"] >= 1


def test_a_mistake_ends_a_script_with_one_message_and_status_1(files):
    command = [sys.executable, "scripts/train_sd3.py", "--config.sample.num_stps=3"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert process.returncode == 1, process
    *_, message = process.stderr.strip().splitlines()  # libraries may warn before
    assert message.startswith("ValueError: ") and "config.sample.num_stps" in message


@pytest.fixture(scope="module")
def weightless(files):
    """A pipeline whose files hold no weights: nothing that needs them gets by."""
    folder = Path(shutil.copytree(files / "sd3", files / "weightless" / "sd3"))
    for file in folder.rglob("*.safetensors"):
        save_file({}, file)
    return folder


def refused(files: Path, *arguments: str, **settings) -> str:
    """What a run says to this; without weights, it can't have waited for them."""
    with pytest.raises(ValueError) as error:
        running.prepare([*running.arguments(files, run_name="bad", **settings), *arguments])
    assert not (files / "logs" / "bad").exists()
    return str(error.value)


BAD_INPUT = {
    "unknown key": ({}, ["--config.sample.num_stps=3"], "sample.num_steps"),
    "wrong type": ({}, ["--config.seed=x"], "--config.seed=x"),
    "world size": ({"sample__num_image_per_prompt": 7}, [], "not a multiple"),
    "no data": ({"dataset": "/nowhere"}, [], "/nowhere"),
    "unknown reward": ({"reward_fn": {"ocrr": 1.0}}, [], "ocrr"),
    "window": ({"sample__sde_window_range": (0, 5)}, [], "sde_window_range"),
    "no GPU": ({"mixed_precision": "fp16"}, [], "fp16 needs a GPU"),
    "micro-batch": ({"train__batch_size": 8}, [], "train.batch_size"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_before_weights_load_and_leaves_no_run(files, weightless, case, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    settings, arguments, named = BAD_INPUT[case]
    assert named in refused(files, *arguments, pretrained__model=weightless, **settings)


def test_a_malformed_line_is_named_by_its_number(files, weightless, tmp_path):
    for split in ("train", "test"):
        rows = ['{"prompt": "a cat"}', '{"prompt": "a dog"', '{"prompt": "a cow"}']
        (tmp_path / f"{split}_metadata.jsonl").write_text("\n".join(rows))
    message = refused(files, dataset=tmp_path, pretrained__model=weightless)
    assert "train_metadata.jsonl, line 2" in message


def test_a_checkpoint_of_another_model_or_other_weights_is_refused(files, weightless):
    run = running.train(running.arguments(files, run_name="other", num_epochs=1))
    saved = folders.checkpoints(run.folder)[-1]
    another = shutil.copytree(weightless, weightless.with_name("another"))
    for changed in ({"use_lora": True}, {"pretrained__model": another}):
        settings = {"pretrained__model": weightless, "resume_from": saved} | changed
        assert "was written with" in refused(files, **settings)
