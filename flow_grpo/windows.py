"""Which steps of a group's rollout are stochastic and trained."""

from collections.abc import Iterable
from math import ceil, exp
from typing import NamedTuple

import ml_collections
import numpy as np

from flow_grpo import randomness
from flow_grpo.rollouts import tree_width


class Slot(NamedTuple):
    """Whose steps are drawn: a group of an epoch."""

    seed: int
    epoch: int
    group: int
    num_groups: int


def trained_steps(
    sample: ml_collections.ConfigDict,
    groups: Iterable[int],
    seed: int,
    epoch: int,
    num_groups: int = 1,
) -> np.ndarray:
    """List the trained steps of each group, (len(groups), K) int64; step i starts at sigma i.

    groups: slots in the epoch. sde_steps: these. Otherwise sde_window_size 0: all but the last
    (arXiv:2505.05470); w: w steps of sde_window_range, as sde_window says, one draw per group.
    """
    groups, num_steps = list(groups), sample.num_steps
    if sample.sde_steps or sample.sde_window_size == 0:
        steps = np.array(tuple(sample.sde_steps) or range(num_steps - 1), dtype=np.int64)
        return np.tile(steps, (len(groups), 1))
    draw = WINDOWS[sample.sde_window]
    steps = [list(draw(sample, Slot(seed, epoch, group, num_groups))) for group in groups]
    return np.array(steps, dtype=np.int64).reshape(len(groups), sample.sde_window_size)


def _random(sample: ml_collections.ConfigDict, slot: Slot) -> Iterable[int]:
    """Consecutive steps, the first uniform in {first, ..., end - w} (Flow-GRPO-Fast)."""
    (first, end), size = sample.sde_window_range, sample.sde_window_size
    start = randomness.rng(slot.seed, "window", slot.epoch, slot.group).randint(first, end - size)
    return range(start, start + size)


def _subset(sample: ml_collections.ConfigDict, slot: Slot) -> Iterable[int]:
    """Distinct steps, all sets alike."""
    source = randomness.rng(slot.seed, "subset", slot.epoch, slot.group)
    return sorted(source.sample(range(*sample.sde_window_range), sample.sde_window_size))


def _stratified(sample: ml_collections.ConfigDict, slot: Slot) -> Iterable[int]:
    """One step, so that an epoch's groups cover the range evenly (Flash-GRPO)."""
    first, end = sample.sde_window_range
    order = list(range(slot.num_groups))
    randomness.rng(slot.seed, "strata", slot.epoch).shuffle(order)
    within = randomness.rng(slot.seed, "stratum", slot.epoch, slot.group).random()
    place = order[slot.group % slot.num_groups] + within
    return [first + int(place * (end - first) / slot.num_groups)]


def _progressive(sample: ml_collections.ConfigDict, slot: Slot) -> Iterable[int]:
    """Consecutive steps that move on with the epochs, and begin again (MixGRPO, arXiv:2507.21802).

    At each place b for ceil(dwell exp(-decay max(0, b - from))) epochs.
    """
    (first, end), size = sample.sde_window_range, sample.sde_window_size
    places = range(first, end - size + 1, sample.window_stride)
    late = (max(0, place - sample.window_decay_from) for place in places)
    ends = np.cumsum([ceil(sample.window_dwell * exp(-sample.window_decay * n)) for n in late])
    epoch = slot.epoch % ends[-1] if sample.window_rolls_back else min(slot.epoch, ends[-1] - 1)
    start = places[int(np.searchsorted(ends, epoch, side="right"))]
    return range(start, start + size)


WINDOWS = {
    "random": _random,
    "subset": _subset,
    "progressive": _progressive,
    "stratified": _stratified,
}


def check(sample: ml_collections.ConfigDict) -> None:
    """Raise ValueError where settings, each within its range, are at odds or train the last step.

    That ends at sigma 0, where its std is so small that log-probs lose all precision.
    """
    fixed, span = tuple(sample.sde_steps), tuple(sample.sde_window_range)
    size, last = sample.sde_window_size, sample.num_steps - 1
    if fixed and size:
        raise ValueError(
            f"config.sample.sde_steps={fixed} and config.sample.sde_window_size={size}: only one "
            "that chooses the trained steps is needed. Set config.sample.sde_window_size to 0 or "
            "config.sample.sde_steps to ()."
        )
    if list(fixed) != sorted(set(fixed)) or (fixed and fixed[-1] >= last):
        raise ValueError(
            f"config.sample.sde_steps={fixed}: distinct, ascending steps from 0 to {last - 1} are "
            f"needed, as config.sample.num_steps={last + 1} and the last step is never trained. "
            "Change config.sample.sde_steps, or raise config.sample.num_steps."
        )
    if size != 1 and sample.sde_window == "stratified":
        raise ValueError(
            f"config.sample.sde_window_size={size} with config.sample.sde_window=stratified: one "
            "step of each group is trained. Set config.sample.sde_window_size to 1."
        )
    if not size and sample.sde_window != "random":
        raise ValueError(
            f"config.sample.sde_window={sample.sde_window!r} with config.sample.sde_window_size=0, "
            "which trains all steps but the last: at least 1 is needed. Set "
            "config.sample.sde_window_size, or config.sample.sde_window=random."
        )
    if size and not (len(span) == 2 and span[0] + size <= span[1] <= last):
        raise ValueError(
            f"config.sample.sde_window_size={size} and config.sample.sde_window_range={span} with "
            f"config.sample.num_steps={last + 1}: (first, end) with first + size <= end <= {last} "
            "is needed, as the last step is never trained. Set config.sample.sde_window_range, for "
            f"example to (0, {min(last, max(size, (last + 1) // 2))}), or shrink "
            "config.sample.sde_window_size."
        )
    _check_branching(sample, num_trained=size or len(fixed) or last)


def _check_branching(sample: ml_collections.ConfigDict, num_trained: int) -> None:
    """Refuse branches that would not come out even, or would all be one image."""
    branching, size = sample.branching, sample.num_image_per_prompt
    of_rank = sample.train_batch_size * sample.num_batches_per_epoch
    if branching == "none":
        return
    said = f"config.sample.branching={branching!r}"
    if branching == "shared_prefix" and not sample.same_latent:
        raise ValueError(
            f"{said} with config.sample.same_latent=False: only rows of one initial noise share "
            "their first steps. Set config.sample.same_latent=True, or config.sample.branching="
            "trunk."
        )
    if sample.noise_level == 0:
        raise ValueError(
            f"{said} with config.sample.noise_level=0: a group's images would all be the same. A "
            "positive number is needed, 0.7 for example."
        )
    shares = {"per_step": num_trained, "strides": 2 * num_trained}.get(branching, 1)
    if shares > 1 and (size % shares or size == shares):
        raise ValueError(
            f"config.sample.num_image_per_prompt={size} with {said} and {num_trained} trained "
            f"step(s): a multiple of {shares} from {2 * shares} on is needed, so that each step "
            f"has equally many, and two to compare."
        )
    if branching == "tree" and not tree_width(size, num_trained):
        example = ", ".join(str(width**num_trained) for width in (2, 3, 4))
        raise ValueError(
            f"config.sample.num_image_per_prompt={size} with {said} and {num_trained} trained "
            f"step(s), at each of which paths split: {example} or another power of {num_trained} "
            "is needed. Change it, or config.sample.sde_window_size."
        )
    if branching in ("strides", "tree") and of_rank % size:
        raise ValueError(
            f"config.sample.num_image_per_prompt={size} with {said} and {of_rank} images of a rank "
            f"(sample.train_batch_size {sample.train_batch_size} x sample.num_batches_per_epoch "
            f"{sample.num_batches_per_epoch}): whole groups are needed. Make it a divisor of "
            f"{of_rank}."
        )
