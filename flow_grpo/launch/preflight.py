"""Refuse what can't work, before a weight is loaded; what costs least comes first."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

from accelerate.utils import is_tensorboard_available, is_wandb_available
from ml_collections import ConfigDict

from config.base import keys_of
from flow_grpo import keys, plan, windows
from flow_grpo.launch import model_files, provenance
from flow_grpo.objectives.registry import anywhere, find
from flow_grpo.prompts import Prompt
from flow_grpo.rewards import loading
from flow_grpo.rewards.remote import health, servers
from flow_grpo.training import claim

TRACKERS = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}


def check(config: ConfigDict, world_size: int, argv: Sequence[str] = ("SCRIPT",)) -> plan.Plan:
    """Check all that needs no model and return the epoch's arithmetic. Raises ValueError.

    argv: the command line, for what is to be pasted.
    """
    keys.check(config, keys_of(config))
    if config.run_name:
        _check_name(config.run_name)
    windows.check(config.sample)
    if config.hacking_alarm != "none" and not config.eval_reward_fn:
        raise ValueError(
            f"config.hacking_alarm={config.hacking_alarm}: it watches the held-out rewards, and "
            f"there are none. Name some, as --config.eval_reward_fn=\"('clipscore',)\"."
        )
    _check_rewards(config)
    model_files.check(config)
    found = plan.make(config, world_size)
    model_files.check_prompts(config, found.train_prompts + found.eval_prompts)
    _check_choice(config)
    _check_merged(config)
    _check_answers(config, found.train_prompts)
    _check_prompts(config, found.train_prompts + found.eval_prompts)
    _check_tracker(config)
    keys_to_continue = {"run_name": config.run_name, "resume_from": "latest"}
    _check_folder(config, provenance.command(argv, world_size, **keys_to_continue))
    _check_comparing(config, health.check(servers.of(config)))
    return found


def check_evaluation(config: ConfigDict) -> list[Prompt]:
    """Check what an evaluation alone needs and return its prompts. Raises ValueError."""
    keys.check(config, keys_of(config))
    _check_rewards(config)
    model_files.check(config)
    found = plan.eval_prompts(config)
    model_files.check_prompts(config, found)
    _check_prompts(config, found)
    _check_comparing(config, health.check(servers.of(config)))
    return found


def _check_rewards(config: ConfigDict) -> None:
    if not any(config.reward_fn.values()):
        raise ValueError(
            f"config.reward_fn={dict(config.reward_fn)}: a reward of non-zero weight is needed, "
            f"for example --config.reward_fn=\"{{'jpeg_compressibility': 1.0}}\"."
        )
    held_out, where = tuple(config.eval_reward_fn), servers.of(config)
    for name in held_out:
        if config.reward_fn.get(name, 0):
            raise ValueError(
                f"config.eval_reward_fn={held_out}: {name!r} is trained. Name rewards that have no "
                f"weight in config.reward_fn."
            )
    for key, given in {"reward_fn": dict(config.reward_fn), "eval_reward_fn": held_out}.items():
        for name in given:
            try:
                compares = not where.alone_knows(name) and loading.find(name).needs_groups
            except ValueError as error:
                raise ValueError(f"config.{key}={given}: {error}") from error
            _check_comparing(config, {name} if compares else ())


def _check_comparing(config: ConfigDict, names: Collection[str]) -> None:
    """Refuse rewards that compare a group's images where they would not get whole groups."""
    sample, held_out = config.sample, tuple(config.eval_reward_fn)
    rows = sample.train_batch_size * sample.num_batches_per_epoch
    step = math.lcm(sample.train_batch_size, sample.num_image_per_prompt) // sample.train_batch_size
    for name in names:
        if name in held_out:
            raise ValueError(
                f"config.eval_reward_fn={held_out}: {name!r} compares a group's images, and "
                f"evaluations have no groups. Name rewards that score each image alone."
            )
        if rows % sample.num_image_per_prompt:
            nearest = max(1, (2 * sample.num_batches_per_epoch + step) // (2 * step)) * step
            raise ValueError(
                f"config.sample.num_batches_per_epoch={sample.num_batches_per_epoch}: the reward "
                f"{name!r} compares a group's images, so each rank must hold whole groups, and "
                f"{rows} images (train_batch_size {sample.train_batch_size} x num_batches_per_epoch"
                f") are no multiple of sample.num_image_per_prompt {sample.num_image_per_prompt}. "
                f"The nearest num_batches_per_epoch is {nearest}."
            )


def _check_prompts(config: ConfigDict, prompts: list[Prompt]) -> None:
    settings = loading.settings(config)
    texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
    for name in (*config.reward_fn, *config.eval_reward_fn):
        if name not in config.reward_urls:
            loading.check(name, settings, texts, metadata)


def _check_choice(config: ConfigDict) -> None:
    """Refuse to fill dropped groups up if none are, or to train depths that a tree lacks."""
    if config.sample.max_refills and not config.train.drop_equal_groups:
        raise ValueError(
            f"config.sample.max_refills={config.sample.max_refills} with config.train."
            f"drop_equal_groups=False: groups are drawn in place of those that are dropped. Set "
            f"config.train.drop_equal_groups=True, or config.sample.max_refills=0."
        )
    depths, most = config.train.tree_depths, 0
    if config.sample.branching == "tree" and find(config.objective).keeps:
        most = windows.trained_steps(config.sample, [0], config.seed, 0).shape[1]
    if depths > most:
        raise ValueError(
            f"config.train.tree_depths={depths} with config.sample.branching="
            f"{config.sample.branching!r} and config.objective={config.objective!r}, which train "
            f"the steps of {most} depth(s). Set config.train.tree_depths=0, or train a policy "
            f"gradient with config.sample.branching=tree and more trained steps."
        )


def _check_merged(config: ConfigDict) -> None:
    """Refuse rollouts by merged weights where there are none, no LoRA, or log-probs that train."""
    if not config.sample.merged_lora:
        return
    said = "config.sample.merged_lora=True with"
    if not config.use_lora:
        raise ValueError(
            f"{said} config.use_lora=False: there is no LoRA to add to the weights. Set "
            f"config.sample.merged_lora=False, or train a LoRA."
        )
    if config.sample.source == "data":
        raise ValueError(
            f"{said} config.sample.source=data: nothing is rolled out. Set "
            f"config.sample.merged_lora=False."
        )
    if anywhere(config).keeps:
        raise ValueError(
            f"{said} config.objective={config.objective!r}: a policy gradient needs the log-probs "
            f"of the very weights that train, and merged ones are rounded. Set "
            f"config.sample.merged_lora=False, or take an objective on final images, such as nft."
        )


def _check_answers(config: ConfigDict, prompts: list[Prompt]) -> None:
    """Refuse to train on a data set's own images where it, or the objective, has none."""
    if config.sample.source != "data":
        return
    said, size = "config.sample.source=data", config.sample.num_image_per_prompt
    if find(config.objective).keeps:
        raise ValueError(
            f"{said} with config.objective={config.objective!r}, which needs the steps by which an "
            f"image was drawn. Use dpo, sft, or another objective on final images."
        )
    for prompt in prompts:
        if prompt.size.num_frames > 1:
            raise ValueError(
                f"{said} with {prompt.size.num_frames} frames, by config.num_frames or a prompt's "
                f'"size": only images are read.'
            )
        if len(prompt.answers) != size:
            raise ValueError(
                f"{said} with config.sample.num_image_per_prompt={size}: the prompt "
                f"{prompt.text!r:.60} of config.dataset={config.dataset!r} has "
                f"{len(prompt.answers)} image(s) to train on. Each row of the jsonl needs "
                f'"chosen" and "rejected" (2 images a prompt) or "picture" (1).'
            )


def _check_tracker(config: ConfigDict) -> None:
    if config.tracker in TRACKERS and not TRACKERS[config.tracker]():
        raise ValueError(
            f"config.tracker={config.tracker!r}: its package is not installed. Install it with "
            f"`pip install {config.tracker}`, or set --config.tracker=none."
        )


def _check_name(name: str) -> None:
    """Refuse what would be another place than a folder of its own below config.logdir."""
    keys.check_length("run_name", name)
    parts = name.split("/")
    wrong = {"", ".", "..", *claim.FOLDERS} & set(parts)
    if wrong or name.startswith("~") or not name.isprintable() or parts != [*map(str.strip, parts)]:
        raise ValueError(
            f"config.run_name={name!r}: a name as 'lr1' or 'sweep/lr1' is needed, of a folder in "
            f"config.logdir; not through '.' or '..', nor inside a run, nor blanks at an "
            f"end. For a place elsewhere set --config.logdir=FOLDER --config.run_name=NAME."
        )


def _check_folder(config: ConfigDict, continued: str) -> None:
    folder = Path(config.logdir) / config.run_name
    if not config.run_name:
        return
    if running := claim.in_use(folder):
        raise ValueError(f"config.run_name={config.run_name!r}: {running}")
    if not config.resume_from and (folder / "metrics.jsonl").exists():
        raise ValueError(
            f"config.run_name={config.run_name!r}: {folder} holds a run. Choose another name, "
            f"delete the folder, or continue the run with: {continued}"
        )
