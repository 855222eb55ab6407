"""Run a training script's own code in this process, on a tiny pipeline."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tiny
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import DiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.diffusers_patch.sd3 import SD3
from flow_grpo.launch import entry
from flow_grpo.objectives.registry import OBJECTIVES
from flow_grpo.parallel.faults import stop
from flow_grpo.training import collect
from flow_grpo.training.run import Run

DEFAULT = "config/testbed.py:shapes_sd3_grpo"
PROMPTS = ["a red apple", "two green cubes", "a cat", "three cats", "a sign that says two", "cube"]
TIMINGS = ("seconds/", "memory/", "images_per_second")
SMALL = {
    "dataset": "",  # see arguments()
    "reward_fn": {"jpeg_incompressibility": 1.0},
    "resolution": 32,
    "max_sequence_length": 16,
    "num_epochs": 2,
    "save_freq": 1,
    "eval_freq": 10,
    "tracker": "none",
    "sample.num_steps": 5,
    "sample.eval_num_steps": 3,
    "sample.train_batch_size": 4,
    "sample.test_batch_size": 4,
    "sample.num_image_per_prompt": 4,
    "sample.num_batches_per_epoch": 4,
    "sample.sde_window_size": 2,
    "sample.sde_window_range": (0, 4),
    "train.learning_rate": 3e-4,
    "train.clip_range": 1e-4,
    "train.gradient_accumulation_steps": 2,
    "train.step_weight": "none",
    "train.ema": False,
}


def trained_parameters(run: Run) -> Iterator[tuple[str, torch.nn.Parameter]]:
    named = run.pipeline.transformer.named_parameters()
    return ((name, param) for name, param in named if param.requires_grad)


def arguments(folder: Path, **overrides) -> list[str]:
    """Return a command line; keys are config keys with "__" for the dot.

    Of SMALL, what the chosen objective of OBJECTIVES does not read is left out.
    """
    chosen = OBJECTIVES.get(overrides.get("objective", "grpo"))
    foreign = {key for each in OBJECTIVES.values() for key in each.keys} if chosen else set()
    foreign -= set(chosen.keys if chosen else ())
    settings = {key: value for key, value in SMALL.items() if key not in foreign}
    settings |= {"dataset": folder / "prompts", "logdir": folder / "logs"}
    settings |= {"pretrained.model": folder / "sd3"}
    settings |= {key.replace("__", "."): value for key, value in overrides.items()}
    keys = [f"--config.{key}={value}" for key, value in settings.items()]
    return ["train.py", f"--config={DEFAULT}", *keys]


def make_files(folder: Path) -> Path:
    """Write the tiny pipeline, a LoRA for it and a data set into a folder; returns it."""
    tiny.save("sd3", folder / "sd3")
    save_random_lora(folder / "sd3", folder / "lora")
    (folder / "prompts").mkdir()
    for split in ("train", "test"):
        (folder / "prompts" / f"{split}.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


def lora(folder: Path) -> dict:
    """Return the overrides that train the random LoRA of make_files()."""
    return {
        "use_lora": True,
        "train__lora_path": folder / "lora",
        "train__lora_rank": 4,
        "train__lora_alpha": 8,
    }


def save_random_lora(
    pipeline: Path, folder: Path, rank: int = 4, family: type[PatchedPipeline] = SD3
) -> None:
    """Write a LoRA whose B is not zero, so that nothing passes because the adapter does nothing."""
    pipe = DiffusionPipeline.from_pretrained(pipeline)
    torch.manual_seed(1)
    targets = list(family.lora_target_modules)
    pipe.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    with torch.no_grad():
        for name, param in pipe.transformer.named_parameters():
            if "lora_B" in name:
                param.normal_(std=0.02)
    pipe.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        **_collate_lora_metadata({"transformer": pipe.transformer}),
    )


def prepare(argv: list[str], family: type[PatchedPipeline] = SD3) -> Run:
    """Build a run; a previous one in this process is forgotten."""
    with fresh_process():
        return entry.prepare(argv, family, DEFAULT)


@contextmanager
def fresh_process() -> Iterator[None]:
    """Forget previous runs of this process, and give back the handlers that a run replaces."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    handlers = {number: signal.getsignal(number) for number in stop.SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(argv: list[str], family: type[PatchedPipeline] = SD3) -> Run:
    """Train to the end and return the run."""
    run = prepare(argv, family)
    assert entry.execute(run) == 0
    return run


def metrics(folder: Path) -> list[dict]:
    """Return all rows of a run's metrics.jsonl without what differs from run to run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMINGS)} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the trained weights of a run's last checkpoint."""
    last = max((folder / "checkpoints").iterdir(), key=lambda p: int(p.name.split("-")[1]))
    return checkpoint_weights(last)


def checkpoint_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the policy's and the snapshots' weights in a checkpoint, as "policy/<weight>" ..."""
    return load_file(folder / "weights-0.safetensors")


def gate(folder: Path, figure: str = "log_ratio") -> dict[str, float]:
    """Return a figure of each step before the first update, by default the largest log-ratio."""
    return json.loads((folder / "gate.json").read_text())[figure]


def break_losses(run: Run, broken: set[int]) -> None:
    """Make the last loss NaN in the updates numbered `broken`, counted whether taken or not."""
    honest, tried, calls = run.objective.loss, [], []

    def loss(*arguments):
        calls.append(1)
        value = honest(*arguments)
        steps = arguments[2].steps.shape[1]
        last = len(calls) == steps * run.config.train.gradient_accumulation_steps
        if last and len(tried) in broken:
            value.value = value.value * float("nan")
        return value

    def counted(*numbers):
        tried.append(1)
        calls.clear()
        return finish(*numbers)

    finish = run.updater.finish
    run.objective.loss, run.updater.finish = loss, counted


def fail_in_epoch(run: Run, epoch: int) -> None:
    """Let this rank fail in the epoch's first loss, counted from 0."""
    honest = run.objective.loss

    def loss(*arguments):
        if run.epoch == epoch:
            raise RuntimeError("out of luck")
        return honest(*arguments)

    run.objective.loss = loss


class Watched:
    """A scoring whose batches are counted and whose result is changed."""

    def __init__(self, scoring, held_out, batches, change):
        self.scoring, self.held_out, self.batches, self.change = scoring, held_out, batches, change

    def add(self, batch) -> None:
        self.batches.append((len(batch), self.held_out))
        self.scoring.add(batch)

    def result(self, patience_s) -> dict:
        return self.change(self.scoring.result(patience_s), self.held_out)


def watch_scores(run: Run, change=lambda scores, held_out: scores) -> list[tuple[int, bool]]:
    """Return what will hold each sampling call's number of images and whether it evaluates.

    change: what becomes of the scores of an epoch or an evaluation.
    """
    start, batches = run.evaluator.scorer.start, []
    run.evaluator.scorer.start = lambda held_out=False: Watched(
        start(held_out), held_out, batches, change
    )
    return batches


def record_rollouts(folder: Path, rank: int) -> None:
    """Save what each rank holds of every epoch, once it has its advantages."""
    honest = collect.weigh

    def weigh(run, sampled, scores, epoch):
        outcome, rollout = honest(run, sampled, scores, epoch), sampled.rollout
        names = ("steps", "latents", "next_latents", "log_probs", "final", "advantages")
        held = {name: getattr(rollout, name) for name in names}
        held |= {"group": rollout.batch.group, "member": rollout.batch.member}
        held |= {f"score/{key}": torch.from_numpy(value) for key, value in scores.items()}
        save_file({k: v.contiguous() for k, v in held.items()}, folder / f"{rank}-{run.epoch}")
        return outcome

    collect.weigh = weigh


def die_after(run: Run, num_updates: int) -> None:
    """Let the process be killed as soon as it has logged this many updates."""
    honest = run.tracker.log

    def log(kind, epoch, done, values):
        honest(kind, epoch, done, values)
        if (kind, done) == ("update", num_updates):
            os.kill(os.getpid(), signal.SIGKILL)

    run.tracker.log = log


if __name__ == "__main__":  # train_sd3.py with something done to it, as MODE says
    mode = os.environ["MODE"]
    if mode == "patient":  # however long a launcher takes to repeat a signal
        stop.PATIENCE_S = math.inf
    trained = entry.prepare(sys.argv, SD3, DEFAULT)
    rank = trained.ranks.rank
    if mode.startswith("die after update "):
        die_after(trained, int(mode.split()[-1]))
    elif mode == "die once" and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        die_after(trained, 3)
    elif mode.startswith("/"):
        record_rollouts(Path(mode), rank)
    elif mode.startswith("fail") and rank == trained.ranks.num_ranks - 1:
        fail_in_epoch(trained, 1)
    elif mode == "break" and rank == trained.ranks.num_ranks - 1:  # the others must learn of it
        break_losses(trained, {0})
    entry.leave(entry.execute(trained))
