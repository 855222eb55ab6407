"""The arithmetic of an epoch: groups, micro-batches, passes through the transformer. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import ml_collections

from flow_grpo import prompts
from flow_grpo.prompts import Prompt

PUBLISHED_GROUPS, PUBLISHED_GROUP_SIZE = 48, 24  # an epoch of Flow-GRPO (arXiv:2505.05470)


@dataclass(frozen=True)
class Plan:
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
            f"{self.num_groups} groups x {self.group_size} = {self.num_groups * self.group_size} "
            f"pictures, {self.num_updates} optimizer step(s) a pass"
        )

    def beside_published(self, num_batches: int) -> str:
        """Compare with the published 48 groups of 24. num_batches: of an epoch, on each rank."""
        published = f"{PUBLISHED_GROUPS} groups of {PUBLISHED_GROUP_SIZE}"
        if self.num_groups >= PUBLISHED_GROUPS and self.group_size >= PUBLISHED_GROUP_SIZE:
            return f"at least the {published} of published runs"
        few = []
        if self.num_groups < PUBLISHED_GROUPS:
            steps = range(2, 2 * PUBLISHED_GROUPS * num_batches + 1, 2)  # an even number a rank
            fits = (n for n in steps if n * self.num_groups >= PUBLISHED_GROUPS * num_batches)
            needed = next(n for n in fits if n * self.num_groups % num_batches == 0)
            few.append(
                f"fewer groups, so noisier advantages (sample.num_batches_per_epoch={needed} "
                f"gives {needed * self.num_groups // num_batches} on these ranks)"
            )
        if self.group_size < PUBLISHED_GROUP_SIZE:
            few.append("smaller groups")
        return f"published runs have {published}; here: {', '.join(few)}"

    def passes(
        self,
        config: ml_collections.ConfigDict,
        *,
        guided: bool,
        num_points: int,
        num_anchors: int,
        num_prepared: int,
    ) -> dict[str, int]:
        """Count an epoch's passes of one image through the transformer, on all ranks.

        guided: sampling makes two passes a step. num_points: where an objective trains an image;
        at each, num_anchors frozen predictions in every update, num_prepared before the first.
        Evaluation is not counted.
        """
        images, train = self.num_groups * self.group_size, config.train
        points = num_points * images * (2 if guided and train.cfg else 1)
        trained = points * train.num_inner_epochs
        return {
            "sampling": images * config.sample.num_steps * (2 if guided else 1),
            "forward and backward": trained,
            "frozen predictions": trained * num_anchors,
            "before the first update": points * num_prepared,
        }


def make(config: ml_collections.ConfigDict, world_size: int) -> Plan:
    """Read the prompts and return the epoch's arithmetic.

    Raises ValueError where the numbers do not divide.
    """
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
    if rows % micro_batch_size:
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
    _check_buckets(config, train_prompts)
    return Plan(
        world_size=world_size,
        num_groups=total // group_size,
        group_size=group_size,
        num_micro_batches=num_micro_batches,
        micro_batch_size=micro_batch_size,
        num_updates=num_micro_batches // train.gradient_accumulation_steps,
        train_prompts=train_prompts,
        eval_prompts=eval_prompts(config),
    )


def eval_prompts(config: ml_collections.ConfigDict) -> list[Prompt]:
    """Read the prompts that an evaluation draws."""
    return prompts.read(config.dataset, config.eval_split)[: config.eval_max_samples or None]


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


def _micro_batch_size(config: ml_collections.ConfigDict) -> int:
    chosen = config.train.batch_size
    return config.sample.train_batch_size if chosen is None else chosen
