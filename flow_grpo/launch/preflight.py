"""Refuse what can't work, before a weight is loaded."""

from __future__ import annotations

import math
from pathlib import Path

import ml_collections

from flow_grpo import plan, rollouts, sde
from flow_grpo.launch import model_files
from flow_grpo.objectives import OBJECTIVES
from flow_grpo.prompts import Prompt
from flow_grpo.rewards import REWARDS, loading
from flow_grpo.rewards.remote import servers

CHOICES = {
    "objective": tuple(OBJECTIVES),
    "eval_split": ("test", "dev"),
    "mixed_precision": ("no", "bf16", "fp16"),
    "tracker": ("tensorboard", "wandb", "none"),
    "encoders": ("keep", "offload", "precompute"),
    "reward_aggregation": ("sum", "gdpo"),
    "hacking_alarm": ("none", "warn", "stop"),
    "on_reward_error": ("stop", "mask"),
    "reward_encoding": tuple(servers.ENCODINGS),
    "sample.sde_type": sde.STOCHASTIC,
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
    "num_frames",
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
    "reference_area",
    "sample.noise_level",
    "train.learning_rate",
    "train.lr_warmup_steps",
    "train.max_grad_norm",
    "train.clip_range",
    "train.beta",
    "train.ema_decay",
    "nft.kl_beta",
)
POSITIVE = ("train.adv_clip_max", "train.gate_tolerance", "nft.beta")


def check(config: ml_collections.ConfigDict, world_size: int) -> plan.Plan:
    """Check all that needs no weights and return the epoch's arithmetic.

    Raises ValueError naming the key, the value, what is needed and the remedy.
    """
    _check_values(config)
    rollouts.check(
        config.sample.num_steps,
        config.sample.sde_window_size,
        tuple(config.sample.sde_window_range),
        tuple(config.sample.sde_steps),
    )
    _check_noisings(config)
    _check_rewards(config)
    model_files.check(config)
    found = plan.make(config, world_size)
    _check_prompts(config, found.train_prompts + found.eval_prompts)
    _check_folder(config)
    servers.check(servers.of(config))
    return found


def check_evaluation(config: ml_collections.ConfigDict) -> list[Prompt]:
    """Check what an evaluation alone needs and return its prompts. Raises ValueError."""
    _check_values(config)
    _check_rewards(config)
    model_files.check(config)
    found = plan.eval_prompts(config)
    _check_prompts(config, found)
    servers.check(servers.of(config))
    return found


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


def _check_noisings(config: ml_collections.ConfigDict) -> None:
    steps, known = list(config.nft.steps), range(config.sample.num_steps)
    if steps != sorted(set(steps) & set(known)):
        raise ValueError(
            f"config.nft.steps={tuple(steps)}: distinct, ascending steps from 0 to {known[-1]} are "
            f"needed, as config.sample.num_steps={len(known)}; or () to draw nft.num_times."
        )


def _check_rewards(config: ml_collections.ConfigDict) -> None:
    for name, weight in config.reward_fn.items():
        if not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(
                f"config.reward_fn={dict(config.reward_fn)}: the weight of {name!r} must be a "
                f"finite number."
            )
        compares = _compares(name, config, f"config.reward_fn={dict(config.reward_fn)}")
        sample = config.sample
        if compares and sample.train_batch_size % sample.num_image_per_prompt:
            raise ValueError(
                f"config.sample.train_batch_size={sample.train_batch_size}: the reward {name!r} "
                f"compares the pictures of a group, so a multiple of "
                f"sample.num_image_per_prompt {sample.num_image_per_prompt} is needed."
            )
    if not any(config.reward_fn.values()):
        raise ValueError(
            f"config.reward_fn={dict(config.reward_fn)}: a reward of non-zero weight is needed, "
            f"for example --config.reward_fn=\"{{'jpeg_compressibility': 1.0}}\"."
        )
    _check_held_out(config)
    servers.check_values(config)
    servers.of(config)


def _check_held_out(config: ml_collections.ConfigDict) -> None:
    held_out = tuple(config.eval_reward_fn)
    for name in held_out:
        trained = config.reward_fn.get(name, 0)
        if trained or _compares(name, config, f"config.eval_reward_fn={held_out}"):
            why = "is trained" if trained else "compares a group's pictures; evaluations have none"
            raise ValueError(
                f"config.eval_reward_fn={held_out}: {name!r} {why}. Name rewards that score each "
                f"picture alone and have no weight in config.reward_fn."
            )
    if config.hacking_alarm != "none" and not held_out:
        raise ValueError(
            f"config.hacking_alarm={config.hacking_alarm}: it watches the held-out rewards, and "
            f"there are none. Name some, as --config.eval_reward_fn=\"('clipscore',)\"."
        )


def _compares(name: str, config: ml_collections.ConfigDict, key: str) -> bool:
    """Whether a reward needs whole groups; of a server's own reward only the server knows."""
    if name in config.reward_urls and name not in REWARDS:
        return False
    try:
        return loading.needs_groups(name)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _check_prompts(config: ml_collections.ConfigDict, prompts: list[Prompt]) -> None:
    """Refuse prompts that a reward can't score."""
    settings = loading.settings(config)
    local = [
        name
        for name in (*config.reward_fn, *config.eval_reward_fn)
        if name not in config.reward_urls
    ]
    for name in local:
        loading.check(name, settings, [p.text for p in prompts], [p.metadata for p in prompts])


def _check_folder(config: ml_collections.ConfigDict) -> None:
    folder = Path(config.logdir) / config.run_name
    if config.run_name and not config.resume_from and (folder / "metrics.jsonl").exists():
        raise ValueError(
            f"config.run_name={config.run_name!r}: {folder} holds a run. Continue it with "
            f"--config.resume_from=latest, choose another name, or delete the folder."
        )


def _get(config: ml_collections.ConfigDict, key: str):
    for part in key.split("."):
        config = config[part]
    return config
