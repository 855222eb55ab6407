"""The arithmetic of an epoch: groups, micro-batches, updates, passes through the transformer."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import ml_collections
import numpy as np

from flow_grpo import prompts, randomness
from flow_grpo.prompts import Prompt
from flow_grpo.records import Size

_epoch_prompts = lru_cache(maxsize=2)(prompts.epoch_prompts)
PUBLISHED_GROUPS, PUBLISHED_GROUP_SIZE = 48, 24  # an epoch of Flow-GRPO (arXiv:2505.05470)


class Part(NamedTuple):
    """Groups of an epoch that are drawn together."""

    first: int  # slot
    num_groups: int
    num_batches: int  # calls of each rank, if no row shares a step

    @property
    def groups(self) -> range:
        return range(self.first, self.first + self.num_groups)


# [inner epoch][update][rank] -> micro-batches: numbers of rows among all ranks'. ~n is row n once
# more with weight 0, to fill a micro-batch up.
Updates = list[list[list[list[np.ndarray]]]]


class Passes(NamedTuple):
    """How many velocities of a row are predicted; guidance makes two passes of one."""

    trained: float  # with a gradient, in each inner epoch
    frozen: float  # once an update, in each inner epoch
    prepared: float  # before the first update of an epoch
    share: float = 1.0  # of the rows that train, if all groups have the usual number
    reference: tuple[float, float] = (0.0, 0.0)  # of frozen and prepared ones, the reference's


@dataclass(frozen=True)
class Plan:
    world_size: int
    num_groups: int
    group_size: int
    num_micro_batches: int  # of each rank
    micro_batch_size: int
    num_updates: int  # optimizer steps of one pass
    num_inner_epochs: int  # passes
    seed: int
    train_prompts: list[Prompt]
    eval_prompts: list[Prompt]
    row_sizes: np.ndarray | None = None  # (N,) of an epoch's rows, as sizes_of(); None: one size

    def __str__(self) -> str:
        sizes = dict.fromkeys(str(prompt.size) for prompt in self.train_prompts)
        named = f" of {', '.join(sizes)}" if len(sizes) > 1 else ""
        return (
            f"{self.world_size} rank(s), {len(self.train_prompts)} prompts{named}; an epoch: "
            f"{self.num_groups} groups x {self.group_size} = {self.num_groups * self.group_size} "
            f"images, {self.num_updates} optimizer step(s) a pass"
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

    def asked(self, groups: Iterable[int], epoch: int) -> dict[int, Prompt]:
        """Return the prompt of each group slot of an epoch; of a refill's at random."""
        count = len(self.train_prompts)
        planned = _epoch_prompts(count, self.num_groups, self.seed, epoch)

        def number(slot: int) -> int:
            if slot < self.num_groups:
                return planned[slot]
            return randomness.rng(self.seed, "refill", epoch, slot).randrange(count)

        return {slot: self.train_prompts[number(slot)] for slot in groups}

    def sizes_of(self, groups: Iterable[int], epoch: int) -> list[int]:
        """Number the sizes of each group slot's prompt: rows of one number may share a call."""
        groups = list(groups)
        if len(self._numbers) < 2:
            return [0] * len(groups)
        asked = self.asked(dict.fromkeys(groups), epoch)
        return [self._numbers[asked[group].sizes] for group in groups]

    @cached_property
    def _numbers(self) -> dict[tuple, int]:
        distinct = dict.fromkeys(prompt.sizes for prompt in self.train_prompts)
        return {sizes: number for number, sizes in enumerate(distinct)}

    def whole(self, sample: ml_collections.ConfigDict) -> Part:
        """Return the part that every epoch draws."""
        return Part(0, self.num_groups, sample.num_batches_per_epoch)

    def refill(self, sample: ml_collections.ConfigDict, first: int, wanted: int) -> Part:
        """Return the smallest part with so many groups, from this slot, that all ranks can draw.

        A rank has whole groups in it if it has whole ones otherwise.
        """
        rows, size = sample.train_batch_size, self.group_size
        whole = rows * sample.num_batches_per_epoch % size == 0
        on = rows if whole else rows * self.world_size
        sizes = (n for n in itertools.count(1) if n * on % size == 0)
        total = self.world_size * rows
        num_batches = next(n for n in sizes if n * total >= wanted * size)
        return Part(first, num_batches * total // size, num_batches)

    def passes(
        self,
        config: ml_collections.ConfigDict,
        of_row: Passes,
        guided: bool,
        num_sampled: int,
        guides_reference: bool | None = None,
    ) -> dict[str, int]:
        """Count an epoch's passes of one image through the transformer, on all ranks.

        of_row: what an objective predicts at a row. num_sampled: steps, of all rows. Guided: by two
        passes; of the reference None: as what trains.
        """
        train, rows = config.train, self.num_groups * self.group_size
        trains = 2 if guided and train.cfg else 1
        more = 0 if guides_reference is None else 1 + guides_reference - trains
        rows = rows * of_row.share
        trained = rows * trains
        frozen, prepared = (
            trains * every + more * of_reference
            for every, of_reference in zip(of_row[1:3], of_row.reference, strict=True)
        )
        return {
            "sampling": num_sampled * (2 if guided else 1),
            "forward and backward": round(trained * of_row.trained * train.num_inner_epochs),
            "frozen predictions": round(rows * frozen * train.num_inner_epochs),
            "before the first update": round(rows * prepared),
        }

    def in_order(self, rows: list[np.ndarray], epoch: int) -> Updates:
        """Cut each rank's rows, in their order, into micro-batches and deal these to updates."""
        size = self.micro_batch_size
        cut = [[part[i : i + size] for i in range(0, len(part), size)] for part in rows]
        return self.in_sets(cut, rows, epoch)

    def in_sets(self, sets: list[list[np.ndarray]], rows: list[np.ndarray], epoch: int) -> Updates:
        """Pack sets of rows, such as pairs, whole into micro-batches; other rows are left out.

        sets: of each rank, each of at most micro_batch_size rows. Each run of num_updates sets,
        rank after rank, gives one to every update, which so does not depend on the ranks. rows: of
        each rank, of which the first, with weight 0, fills up what is short.
        """
        owned = [[(rank, each)] for rank, mine in enumerate(sets) for each in mine]
        return self._dealt(owned, rows, epoch)

    def in_groups(
        self, rows: list[np.ndarray], trained: np.ndarray, group: np.ndarray, epoch: int
    ) -> Updates:
        """Give each update whole groups; each of their trained rows stays on its rank.

        rows: of each rank. trained: (N,) bool, group: (N,) int64, of all rows.
        """
        owned: dict[int, list] = {}
        for rank, mine in enumerate(rows):
            for n in mine[trained[mine]]:
                owned.setdefault(int(group[n]), []).append((rank, np.array([n])))
        return self._dealt([owned[each] for each in sorted(owned)], rows, epoch)

    def _dealt(
        self, owned: list[list[tuple[int, np.ndarray]]], rows: list[np.ndarray], epoch: int
    ) -> Updates:
        """Deal what is owned, each sets of rows with their ranks, to the updates in turn."""
        updates: Updates = []
        for inner in range(self.num_inner_epochs):
            dealt: list[list[list[np.ndarray]]] = [
                [[] for _ in rows] for _ in range(self.num_updates)
            ]
            for start in range(0, len(owned), self.num_updates):
                order, run = list(range(self.num_updates)), start // self.num_updates
                randomness.rng(self.seed, "updates", epoch, inner, run).shuffle(order)
                for update, sets in zip(order, owned[start:], strict=False):
                    for rank, each in sets:
                        dealt[update][rank].append(each)
            updates.append([self._packed(of_ranks, rows) for of_ranks in dealt])
        return updates

    def _packed(
        self, of_ranks: list[list[np.ndarray]], rows: list[np.ndarray]
    ) -> list[list[np.ndarray]]:
        """Make an update's micro-batches of its sets, equally many of equal length on all ranks.

        The pictures of one have equal sizes.
        """
        size, packed = self.micro_batch_size, [[] for _ in of_ranks]
        for micros, sets in zip(packed, of_ranks, strict=True):
            latest: dict[int, list[int]] = {}  # of each size
            for each in sets:
                assert len(each) <= size, f"a set of {len(each)} rows in a micro-batch of {size}"
                (alike,) = {0} if self.row_sizes is None else {*self.row_sizes[each].tolist()}
                if alike not in latest or len(latest[alike]) + len(each) > size:
                    micros.append([])
                    latest[alike] = micros[-1]
                latest[alike] += each.tolist()
        for micros, mine in zip(packed, rows, strict=True):
            micros += [[] for _ in range(max(map(len, packed)) - len(micros))]
            for micro in micros:
                fill = mine[0] if self.row_sizes is None or not micro else micro[0]
                micro += [~fill] * (size - len(micro))
        return [[np.array(micro, dtype=np.int64) for micro in micros] for micros in packed]


def make(config: ml_collections.ConfigDict, world_size: int) -> Plan:
    """Read the prompts and do an epoch's arithmetic. Raises ValueError if it does not divide."""
    sample, train = config.sample, config.train
    rows = sample.train_batch_size * sample.num_batches_per_epoch  # of each rank
    total, group_size = world_size * rows, sample.num_image_per_prompt
    if total % group_size:
        raise ValueError(
            f"{world_size} rank(s) x sample.train_batch_size {sample.train_batch_size} x "
            f"sample.num_batches_per_epoch {sample.num_batches_per_epoch} = {total} images, not "
            f"a multiple of sample.num_image_per_prompt {group_size}. Change one of the four."
        )
    micro_batch_size = sample.train_batch_size if train.batch_size is None else train.batch_size
    if rows % micro_batch_size:
        raise ValueError(
            f"config.train.batch_size={micro_batch_size} does not divide the {rows} images of a "
            f"rank's epoch (sample.train_batch_size x sample.num_batches_per_epoch)."
        )
    num_micro_batches = rows // micro_batch_size
    if num_micro_batches % train.gradient_accumulation_steps:
        raise ValueError(
            f"config.train.gradient_accumulation_steps={train.gradient_accumulation_steps} does "
            f"not divide the {num_micro_batches} micro-batches of a rank's epoch. Change it, or "
            f"config.sample.num_batches_per_epoch."
        )
    train_prompts = prompts.read(config.dataset, "train", size_of(config))
    sizes = {prompt.sizes for prompt in train_prompts}
    calls = {
        "sample.train_batch_size": sample.train_batch_size,
        "train.batch_size": micro_batch_size,
    }
    for key, batch_size in calls.items():
        if len(sizes) > 1 and group_size % batch_size:
            raise ValueError(
                f"config.{key}={batch_size}: the prompts' pictures or reference images have "
                f"{len(sizes)} sizes, so a call must stay within one prompt's group. A divisor of "
                f"sample.num_image_per_prompt {group_size} is needed."
            )
    return Plan(
        world_size=world_size,
        num_groups=total // group_size,
        group_size=group_size,
        num_micro_batches=num_micro_batches,
        micro_batch_size=micro_batch_size,
        num_updates=num_micro_batches // train.gradient_accumulation_steps,
        num_inner_epochs=train.num_inner_epochs,
        seed=config.seed,
        train_prompts=train_prompts,
        eval_prompts=eval_prompts(config),
    )


def eval_prompts(config: ml_collections.ConfigDict) -> list[Prompt]:
    """Read what is evaluated; sample.eval_sizes hold for all prompts, whatever size they name."""
    found = prompts.read(config.dataset, config.eval_split, size_of(config))
    found = found[: config.eval_max_samples or None]
    return [replace(each, size=None) for each in found] if config.sample.eval_sizes else found


def size_of(config: ml_collections.ConfigDict) -> Size:
    """Return the size of prompts that name none."""
    height, width = config.height or config.resolution, config.width or config.resolution
    return Size(height, width, config.num_frames)
