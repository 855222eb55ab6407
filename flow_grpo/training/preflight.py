"""Refuse what can't work, before torch is imported or a weight is loaded."""

from __future__ import annotations

import difflib
import math
import os
from dataclasses import dataclass
from pathlib import Path

import ml_collections

from flow_grpo import window
from flow_grpo.objectives import OBJECTIVES
from flow_grpo.rewards import REWARDS
from flow_grpo.training import prompts
from flow_grpo.training.prompts import Prompt

CHOICES = {
    "objective": tuple(OBJECTIVES),
    "eval_split": ("test", "dev"),
    "mixed_precision": ("no", "bf16", "fp16"),
    "tracker": ("tensorboard", "wandb", "none"),
    "sample.sde_type": ("sde", "cps", "dance"),
    "train.old_log_prob": ("rollout", "replay"),
    "train.kl_mode": ("kl_dt", "kl_true", "x", "v"),
    "train.step_weight": ("none", "std"),
    "train.lr_scheduler": ("constant", "linear", "cosine"),
    "nft.decay": ("on_policy", "half", "slow"),
}
AT_LEAST_ONE = (
    "num_epochs",
    "save_freq",
    "eval_freq",
    "resolution",
    "sample.eval_num_steps",
    "sample.train_batch_size",
    "sample.test_batch_size",
    "sample.num_image_per_prompt",
    "sample.num_batches_per_epoch",
    "train.gradient_accumulation_steps",
    "train.num_inner_epochs",
    "train.lora_rank",
    "train.ema_update_every",
    "train.max_nonfinite_updates",
    "nft.num_times",
)
NOT_NEGATIVE = (
    "eval_max_samples",
    "num_checkpoint_limit",
    "max_sequence_length",
    "sample.noise_level",
    "train.learning_rate",
    "train.lr_warmup_steps",
    "train.max_grad_norm",
    "train.clip_range",
    "train.beta",
    "train.ema_decay",
    "nft.kl_beta",
)
POSITIVE = ("train.adv_clip_max", "nft.beta")


@dataclass(frozen=True)
class Plan:
    """The arithmetic of an epoch."""

    world_size: int
    num_groups: int
    group_size: int
    num_micro_batches: int  # of each rank
    micro_batch_size: int
    num_updates: int  # optimizer steps of one pass
    train_prompts: list[Prompt]
    eval_prompts: list[Prompt]

    def __str__(self) -> str:
        return (
            f"{self.world_size} rank(s), {len(self.train_prompts)} prompts; an epoch: "
            f"{self.num_groups} groups x {self.group_size} pictures, "
            f"{self.num_updates} optimizer step(s) a pass"
        )


def check(config: ml_collections.ConfigDict, world_size: int) -> Plan:
    """Check all that needs no torch and return the epoch's arithmetic.

    Raises ValueError naming the key, the value, what is needed and the remedy.
    """
    _check_values(config)
    window.check(
        config.sample.num_steps,
        config.sample.sde_window_size,
        tuple(config.sample.sde_window_range),
        tuple(config.sample.sde_steps),
    )
    _check_rewards(config)
    _check_model(config)
    if config.train.lora_path:
        _check_lora_path(config.train.lora_path)
    plan = _plan(config, world_size)
    _check_folder(config)
    return plan


def _check_values(config: ml_collections.ConfigDict) -> None:
    for key, choices in CHOICES.items():
        if (value := _get(config, key)) not in choices:
            raise ValueError(f"config.{key}={value!r}: one of {', '.join(choices)} is needed.")
    for key in AT_LEAST_ONE:
        if (value := _get(config, key)) < 1:
            raise ValueError(f"config.{key}={value}: at least 1 is needed.")
    for key in NOT_NEGATIVE:
        if not 0 <= (value := _get(config, key)) < math.inf:
            raise ValueError(f"config.{key}={value}: a number of at least 0 is needed.")
    for key in POSITIVE:
        if not 0 < (value := _get(config, key)) < math.inf:
            raise ValueError(f"config.{key}={value}: a number above 0 is needed.")


def _check_rewards(config: ml_collections.ConfigDict) -> None:
    for name, weight in config.reward_fn.items():
        if not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(
                f"config.reward_fn={dict(config.reward_fn)}: the weight of {name!r} must be a "
                f"finite number."
            )
        if name not in REWARDS:
            near = difflib.get_close_matches(name, REWARDS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"config.reward_fn={dict(config.reward_fn)}: there is no reward {name!r}; there "
                f"are {', '.join(sorted(REWARDS))}.{hint}"
            )
    if not any(config.reward_fn.values()):
        raise ValueError(
            f"config.reward_fn={dict(config.reward_fn)}: a reward of non-zero weight is needed, "
            f"for example --config.reward_fn=\"{{'jpeg_compressibility': 1.0}}\"."
        )


def _check_model(config: ml_collections.ConfigDict) -> None:
    path = config.pretrained.model
    if not path:
        raise ValueError(
            "config.pretrained.model is empty: a diffusers folder or hub id is needed, "
            "for example --config.pretrained.model=stabilityai/stable-diffusion-3.5-medium."
        )
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "model_index.json")):
            raise ValueError(
                f"config.pretrained.model={path!r}: the folder has no model_index.json. The top "
                f"folder of a diffusers pipeline is needed, as save_pretrained writes it."
            )
    elif path.startswith((".", "/")) or path.count("/") != 1:
        raise ValueError(
            f"config.pretrained.model={path!r}: there is no such folder, and it is no hub id "
            f"(owner/name). Correct the path; it is relative to {os.getcwd()}."
        )


def _check_lora_path(path: str) -> None:
    if os.path.isdir(path) and not list(Path(path).glob("*.safetensors")):
        raise ValueError(
            f"config.train.lora_path={path!r}: the folder has no .safetensors file. A LoRA in "
            f"diffusers' format is needed, such as checkpoints/checkpoint-<step>/lora of a run."
        )
    if path.startswith((".", "/")) and not os.path.exists(path):
        raise ValueError(f"config.train.lora_path={path!r}: there is no such file or folder.")


def _plan(config: ml_collections.ConfigDict, world_size: int) -> Plan:
    sample, train = config.sample, config.train
    rows = sample.train_batch_size * sample.num_batches_per_epoch  # of each rank
    total, group_size = world_size * rows, sample.num_image_per_prompt
    if total % group_size:
        raise ValueError(
            f"{world_size} rank(s) x sample.train_batch_size {sample.train_batch_size} x "
            f"sample.num_batches_per_epoch {sample.num_batches_per_epoch} = {total} pictures, not "
            f"a multiple of sample.num_image_per_prompt {group_size}. Change one of the four."
        )
    micro_batch_size = _micro_batch_size(config)
    if micro_batch_size < 1 or rows % micro_batch_size:
        raise ValueError(
            f"config.train.batch_size={micro_batch_size} does not divide the {rows} pictures of a "
            f"rank's epoch (sample.train_batch_size x sample.num_batches_per_epoch)."
        )
    num_micro_batches = rows // micro_batch_size
    if num_micro_batches % train.gradient_accumulation_steps:
        raise ValueError(
            f"config.train.gradient_accumulation_steps={train.gradient_accumulation_steps} does "
            f"not divide the {num_micro_batches} micro-batches of a rank's epoch. Change it, or "
            f"config.sample.num_batches_per_epoch."
        )
    train_prompts = prompts.read(config.dataset, "train")
    eval_prompts = prompts.read(config.dataset, config.eval_split)
    _check_buckets(config, train_prompts)
    return Plan(
        world_size=world_size,
        num_groups=total // group_size,
        group_size=group_size,
        num_micro_batches=num_micro_batches,
        micro_batch_size=micro_batch_size,
        num_updates=num_micro_batches // train.gradient_accumulation_steps,
        train_prompts=train_prompts,
        eval_prompts=eval_prompts[: config.eval_max_samples or None],
    )


def _check_buckets(config: ml_collections.ConfigDict, train_prompts: list[Prompt]) -> None:
    sizes = {prompt.image_sizes for prompt in train_prompts}
    calls = {
        "sample.train_batch_size": config.sample.train_batch_size,
        "train.batch_size": _micro_batch_size(config),
    }
    for key, batch_size in calls.items():
        if len(sizes) > 1 and config.sample.num_image_per_prompt % batch_size:
            raise ValueError(
                f"config.{key}={batch_size}: the reference pictures have {len(sizes)} sizes, so a "
                f"call must stay within one prompt's group. A divisor of "
                f"sample.num_image_per_prompt {config.sample.num_image_per_prompt} is needed."
            )


def _check_folder(config: ml_collections.ConfigDict) -> None:
    folder = Path(config.logdir) / config.run_name
    if config.run_name and not config.resume_from and (folder / "metrics.jsonl").exists():
        raise ValueError(
            f"config.run_name={config.run_name!r}: {folder} holds a run. Continue it with "
            f"--config.resume_from=latest, choose another name, or delete the folder."
        )


def _micro_batch_size(config: ml_collections.ConfigDict) -> int:
    chosen = config.train.batch_size
    return config.sample.train_batch_size if chosen is None else chosen


def _get(config: ml_collections.ConfigDict, key: str):
    for part in key.split("."):
        config = config[part]
    return config
