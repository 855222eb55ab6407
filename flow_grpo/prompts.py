"""Prompt files, and which prompt each row of an epoch gets.

`python -m flow_grpo.prompts check dataset/mine` says what is in the files of a data set.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from flow_grpo import inputs, randomness
from flow_grpo.cli import user_errors
from flow_grpo.records import Size

SPLITS = ("train", "dev", "test")
ANSWERS = (("chosen", "rejected"), ("picture",))  # of a jsonl row: paths, from its file's folder


@dataclass(frozen=True)
class Prompt:
    text: str
    metadata: dict = field(default_factory=dict, hash=False)
    images: tuple[str, ...] = ()  # paths of the reference images
    image_sizes: tuple[tuple[int, int], ...] = ()  # (width, height) of each
    answers: tuple[str, ...] = ()  # paths of the images to train on: chosen, rejected; or picture
    size: Size | None = None  # at which it is drawn; None: as the evaluation says
    where: str = field(default="", compare=False)  # file and line, if it is a jsonl's

    @property
    def sizes(self) -> tuple:
        """What the rows of a call must have in common: the picture's size and the references'."""
        return self.size, self.image_sizes

    @property
    def tag(self) -> str:
        """The kind of prompt that evaluations are broken down by; "" if it has none."""
        return inputs.tag_of(self.metadata)

    def load_images(self) -> tuple[np.ndarray, ...]:
        """Read the reference images, uint8 (H, W, 3) each."""
        return tuple(_read_image(path) for path in self.images)

    def load_answer(self, member: int, width: int, height: int) -> np.ndarray:
        """Read one of `answers`, scaled to fill this size and cut about its middle."""
        image = Image.fromarray(inputs.picture(self.answers[member]))
        return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))


_read_image = lru_cache(maxsize=256)(inputs.picture)


def read(folder: str, split: str, size: Size | None = None) -> list[Prompt]:
    """Read folder/{split}.txt (a prompt a line) or folder/{split}_metadata.jsonl (see inputs.rows).

    A jsonl row reaches the rewards as metadata; it may have ANSWERS, and a "size" (see Size.read).
    size: of prompts that name none. Raises ValueError naming file, line and fault.
    """
    root = Path(folder)
    text, rows = root / f"{split}.txt", root / f"{split}_metadata.jsonl"
    if text.is_file() == rows.is_file():
        found = "both" if text.is_file() else "neither"
        makers = [root / name for name in ("generate.py", "convert.py")]
        hint = "".join(f" {path} makes it; see its README.md." for path in makers if path.is_file())
        raise ValueError(
            f"config.dataset={folder!r}: exactly one of {text.name} and {rows.name} is needed in "
            f"this folder; there is {found}.{hint if found == 'neither' else ''}"
        )
    if text.is_file():
        prompts = [Prompt(line, size=size) for _, line in inputs.lines(text)]
    else:
        prompts = [_prompt(root, size, *row) for row in inputs.rows(rows, "prompt")]
    if not prompts:
        path = text if text.is_file() else rows
        raise ValueError(f"config.dataset={folder!r}: {path} has no prompts.")
    return prompts


def _prompt(root: Path, size: Size | None, where: str, row: dict, images: list[Path]) -> Prompt:
    keys = next((keys for keys in ANSWERS if set(keys) & set(row)), ())
    named = [row.get(key) for key in keys]
    if not all(isinstance(name, str) for name in named):
        raise ValueError(
            f"{where}: {' and '.join(keys)} must be a path (each), from this file's folder, not "
            f"{named!r:.60}."
        )
    answers = [root / name for name in named]
    try:
        sizes, _ = tuple(map(inputs.size, images)), [*map(inputs.size, answers)]
        if (named := row.get("size")) is not None:
            size = Size.read(str(named), size.num_frames if size else 1)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    references, answers = (tuple(map(str, paths)) for paths in (images, answers))
    text = row["prompt"].strip(inputs.MARKS)
    return Prompt(text, row, references, sizes, answers, size, where)


def epoch_prompts(num_prompts: int, num_groups: int, seed: int, epoch: int) -> list[int]:
    """Give the prompt of each group slot, by one permutation of all prompts after another."""
    slots = range(epoch * num_groups, (epoch + 1) * num_groups)
    orders: dict[int, list[int]] = {}
    for lap in {slot // num_prompts for slot in slots}:
        orders[lap] = list(range(num_prompts))
        randomness.rng(seed, "prompts", lap).shuffle(orders[lap])
    return [orders[slot // num_prompts][slot % num_prompts] for slot in slots]


def rollout_rows(
    rank: int, num_batches: int, batch_size: int, group_size: int
) -> Iterator[list[tuple[int, int]]]:
    """Yield the (group, member) of each row, a list a batch of this rank.

    Rows lie group after group, so the same ones share a call on any number of ranks.
    """
    for batch in range(rank * num_batches, (rank + 1) * num_batches):
        rows = range(batch * batch_size, (batch + 1) * batch_size)
        yield [divmod(row, group_size) for row in rows]


def eval_batches(prompts: list[Prompt], batch_size: int) -> list[list[int]]:
    """Cut prompts into batches of equal size.

    Prompts that differ in `sizes` share no batch. What is short is filled up by rows that come
    again: whoever gathers must drop them.
    """
    batch_size = min(batch_size, len(prompts))
    buckets: dict[tuple, list[int]] = {}
    for number, prompt in enumerate(prompts):
        buckets.setdefault(prompt.sizes, []).append(number)
    batches = []
    for bucket in buckets.values():
        for start in range(0, len(bucket), batch_size):
            batch = bucket[start : start + batch_size]
            batches.append(batch + [batch[-1]] * (batch_size - len(batch)))
    return batches


def deal(batches: list[list[int]], rank: int, world_size: int) -> list[list[int]]:
    """Return a rank's batches: all ranks have equally many, for which the last one comes again."""
    return (batches + batches[-1:] * (-len(batches) % world_size))[rank::world_size]


def check(folder: str) -> list[str]:
    """Describe a data set, having decoded every image, a line a fact. Raises ValueError."""
    root, facts, seen = Path(folder), [], {}
    for split in SPLITS:
        names = (f"{split}.txt", f"{split}_metadata.jsonl")
        if any((root / name).is_file() for name in names):
            rows = read(folder, split)
            seen[split] = {(row.text, row.images) for row in rows}
            facts += _facts(split, rows, len(seen[split]))
    if not seen:
        raise ValueError(f"{folder}: no train.txt, train_metadata.jsonl or other split is there.")
    facts += [f"there is no {split} split" for split in ("train", "test") if split not in seen]
    for first, second in combinations(seen, 2):
        shared = seen[first] & seen[second]
        example = f", such as {min(shared)[0]!r}" if shared else ""
        facts.append(f"{first} and {second} share {len(shared)} rows{example}")
    return facts


def _facts(split: str, rows: list[Prompt], num_distinct: int) -> Iterator[str]:
    pictures = {path for row in rows for path in row.images}
    for path in sorted(pictures):
        try:
            _read_image(path)
        except ValueError as error:
            raise ValueError(f"{split}: {error}") from None
    yield f"{split}: {len(rows)} rows, {len(rows) - num_distinct} of them repeated"
    if tags := Counter(row.tag for row in rows if row.tag):
        yield f"{split} tags: {', '.join(f'{tag} {n}' for tag, n in tags.most_common())}"
    if named := Counter(str(row.size) for row in rows if row.size):
        yield f"{split} sizes, height x width: {', '.join(f'{n} {k}' for n, k in named.items())}"
    if pictures:
        sizes = Counter(size for row in rows for size in row.image_sizes)
        shown = ", ".join(f"{width} x {height}: {n}" for (width, height), n in sizes.most_common(5))
        yield f"{split} images: {len(pictures)} files of {len(sizes)} sizes ({shown})"


if __name__ == "__main__":
    with user_errors():
        if len(sys.argv) != 3 or sys.argv[1] != "check":
            raise ValueError("usage: python -m flow_grpo.prompts check FOLDER")
        print(*check(sys.argv[2]), sep="\n")
