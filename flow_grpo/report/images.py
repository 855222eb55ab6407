"""The evaluation's images before and after, small enough for a page."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from flow_grpo.report.recorded import Recorded
from flow_grpo.report.sheets import cut_sheet

SIDES = (320, 256, 192, 128, 96)  # longest side in pixels: the first that fits
NUM_IN_FRONT = 12
PIXEL_ART = 96  # an image at most this wide is kept as it is, and shown magnified


@dataclass(frozen=True)
class Pair:
    """The same prompt and noise; before and after are data URIs."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class Images:
    pairs: list[Pair]
    step_before: int
    step_after: int
    magnified: bool

    def split(self) -> tuple[list[Pair], list[Pair]]:
        """Return NUM_IN_FRONT pairs, spread evenly, and the others."""
        stride = max(1, len(self.pairs) // NUM_IN_FRONT)
        front = self.pairs[::stride][:NUM_IN_FRONT]
        return front, [pair for pair in self.pairs if pair not in front]


def before_and_after(run: Recorded, num_bytes: int) -> Images | None:
    """Return the first and the last evaluation's images in at most num_bytes; None: no two."""
    steps = [row["step"] for row in run.evals if sheet_path(run.folder, row["step"]).is_file()]
    if len(steps) < 2:
        return None
    prompts, before = read_sheet(sheet_path(run.folder, steps[0]))
    _, after = read_sheet(sheet_path(run.folder, steps[-1]))
    pairs = _fitting(list(zip(prompts, before, after, strict=True)), num_bytes)
    return Images(pairs, steps[0], steps[-1], magnified=before[0].width <= PIXEL_ART)


def sheet_path(folder: Path, step: int) -> Path:
    """Where a run keeps the images of its evaluation at this step."""
    return folder / "images" / f"eval-{step:06d}.png"


def read_sheet(path: Path) -> tuple[list[str], list[Image.Image]]:
    """Return a sheet's prompts and images."""
    layout = json.loads(path.with_name("eval.json").read_text())
    prompts = layout["prompts"]
    with Image.open(path) as opened:
        sheet = opened.convert("RGB")
    return prompts, cut_sheet(sheet, len(prompts), tuple(layout["size"]), layout["num_columns"])


def _fitting(both: list[tuple[str, Image.Image, Image.Image]], num_bytes: int) -> list[Pair]:
    """Encode smaller and smaller; at the smallest side, fewer pairs."""
    for side in SIDES:
        pairs = [Pair(text, encode(old, side), encode(new, side)) for text, old, new in both]
        if _size(pairs) <= num_bytes:
            return pairs
    while pairs and _size(pairs) > num_bytes:
        pairs = pairs[: len(pairs) // 2]
    return pairs


def _size(pairs: list[Pair]) -> int:
    return sum(len(pair.before) + len(pair.after) + len(pair.prompt) for pair in pairs)


def encode(image: Image.Image, side: int) -> str:
    """Return a data URI: PNG of a tiny image, else JPEG with at most `side` pixels a side."""
    buffer, kind = io.BytesIO(), "png"
    if image.width <= min(PIXEL_ART, side):
        image.save(buffer, kind, optimize=True)
    else:
        kind = "jpeg"
        image = image.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(buffer, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
