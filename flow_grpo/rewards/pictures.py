"""Read a folder of images and, if they are there, their prompts; numpy and PIL only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image, ImageSequence

from flow_grpo.cli import json_rows

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


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

    metadata.jsonl: see json_rows; its rows' "file" decide which images there are. prompts.txt: a
    line an image, by their names. Raises ValueError naming the file, the line and the fault.
    """
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder; one with images is needed.")
    rows, lines = folder / "metadata.jsonl", folder / "prompts.txt"
    if rows.is_file() and lines.is_file():
        raise ValueError(f"{folder} has both {rows.name} and {lines.name}: delete one of them.")
    if rows.is_file():
        found = [_picture(*row, folder) for row in json_rows(rows, "file")]
    else:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        found = [Picture(file) for file in files]
    if not found:
        raise ValueError(f"{folder} has no images ({', '.join(SUFFIXES)}).")
    if lines.is_file():
        prompts = [line.strip() for line in lines.read_text(encoding="utf-8").splitlines()]
        if len(prompts) != len(found):
            raise ValueError(
                f"{lines} has {len(prompts)} lines and {folder} {len(found)} images: a line an "
                f"image is needed, in the order of their names."
            )
        found = [Picture(each.file, p, {}) for each, p in zip(found, prompts, strict=True)]
    return found


def _picture(where: str, row: dict, references: list[Path], folder: Path) -> Picture:
    for file in (folder / row["file"], *references):
        if not file.is_file():
            raise ValueError(f"{where}: there is no image {file}.")
    return Picture(folder / row["file"], row.get("prompt"), row, tuple(references))


def load(path: Path) -> np.ndarray:
    """Return uint8 (H, W, 3), or (F, H, W, 3) of a file with several frames."""
    try:
        with Image.open(path) as opened:
            frames = [np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(opened)]
    except OSError as error:
        raise ValueError(f"cannot read the image {path} ({error}).") from None
    return np.stack(frames) if len(frames) > 1 else frames[0]
