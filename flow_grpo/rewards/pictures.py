"""Read a folder of images and, if they are there, their prompts; numpy and PIL only."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from flow_grpo import inputs

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass
class Picture:
    file: Path
    prompt: str | None = None  # None: not known
    metadata: dict | None = None
    references: tuple[Path, ...] = ()


class Missing(Sequence):
    """Stands for prompts that a folder does not have; who looks at it raises ValueError."""

    def __init__(self, folder: Path):
        self.remedy = (
            f"it needs the prompts, and {folder} has none. Put a metadata.jsonl with a "
            f'{{"file": ..., "prompt": ...}} an image there, or a prompts.txt with a line each.'
        )

    def __len__(self) -> NoReturn:
        raise ValueError(self.remedy)

    def __getitem__(self, index: slice) -> Missing:
        if isinstance(index, slice):  # a batch's
            return self
        raise ValueError(self.remedy)


def read(folder: Path) -> list[Picture]:
    """List a folder's images, with what metadata.jsonl or prompts.txt says of them.

    metadata.jsonl: see inputs.rows; its rows' "file" decide which images there are. prompts.txt: a
    line an image, by their names, 2.png before 10.png. Raises ValueError naming the file, the line
    and the fault, and an image that was cut.
    """
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder; one with images is needed.")
    rows, lines = folder / "metadata.jsonl", folder / "prompts.txt"
    if os.path.lexists(rows) and os.path.lexists(lines):
        raise ValueError(f"{folder} has both {rows.name} and {lines.name}: delete one of them.")
    if os.path.lexists(rows):
        found = [_picture(*row, folder) for row in inputs.rows(rows, "file")]
    else:
        files = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        shown = (path for path in files if path.name[0] != "." and not path.is_dir())
        found = [Picture(file) for file in sorted(shown, key=_number)]
        for each in found:
            inputs.size(each.file)
    if not found:
        raise ValueError(f"{folder} has no images ({', '.join(SUFFIXES)}).")
    if os.path.lexists(lines):  # what is no file is refused
        prompts = [line for _, line in inputs.lines(lines)]
        if len(prompts) != len(found):
            raise ValueError(
                f"{lines} has {len(prompts)} lines and {folder} {len(found)} images: a line an "
                f"image is needed, in the order of their names; blank lines do not count."
            )
        found = [Picture(each.file, p, {}) for each, p in zip(found, prompts, strict=True)]
    return found


def _number(path: Path) -> tuple[list, str]:
    """Return what names are sorted by: numbers in them as numbers."""
    parts = re.split(r"([0-9]+)", path.stem)
    return [int(part) if n % 2 else part for n, part in enumerate(parts)], path.name


def _picture(where: str, row: dict, references: list[Path], folder: Path) -> Picture:
    file, prompt = folder / row["file"], row.get("prompt")
    for each in (file, *references):
        if not os.path.isfile(each):  # nor is too long a name
            raise ValueError(f"{where}: there is no image {each}.")
        try:
            inputs.size(each)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return Picture(file, prompt and prompt.strip(inputs.MARKS), row, tuple(references))


def load(path: Path) -> np.ndarray:
    """Return inputs.picture(path), or (F, H, W, 3) of a file with several frames."""
    with inputs.opened(path) as image:
        frames = list(inputs.frames(image))
        return np.stack(frames) if len(frames) > 1 else frames[0]
