"""The evaluation's pictures before and after, small enough for a page."""

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
PIXEL_ART = 96  # a picture at most this wide is kept as it is, and shown magnified


@dataclass(frozen=True)
class Pair:
    """The same prompt and noise; before and after are data URIs."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class Pictures:
    """pairs, or, where images/eval.json is missing, the two sheets as one pair."""

    pairs: list[Pair]
    step_before: int
    step_after: int
    magnified: bool
    whole_sheets: bool

    def split(self) -> tuple[list[Pair], list[Pair]]:
        """Return NUM_IN_FRONT pairs, spread evenly, and the others."""
        stride = max(1, len(self.pairs) // NUM_IN_FRONT)
        front = self.pairs[::stride][:NUM_IN_FRONT]
        return front, [pair for pair in self.pairs if pair not in front]


def before_and_after(run: Recorded, num_bytes: int) -> Pictures | None:
    """Return the first and the last evaluation's pictures in at most num_bytes; None: no two."""
    sheets = [(row["step"], sheet_path(run.folder, row["step"])) for row in run.evals]
    sheets = [(step, path) for step, path in sheets if path.is_file()]
    if len(sheets) < 2:
        return None
    (first, path_before), (last, path_after) = sheets[0], sheets[-1]
    prompts, before = read_sheet(path_before)
    _, after = read_sheet(path_after)
    sides = SIDES if prompts else tuple(4 * side for side in SIDES)
    return Pictures(
        pairs=_fitting(list(zip(prompts or [""], before, after, strict=True)), sides, num_bytes),
        step_before=first,
        step_after=last,
        magnified=before[0].width <= PIXEL_ART,
        whole_sheets=not prompts,
    )


def sheet_path(folder: Path, step: int) -> Path:
    """Where a run keeps the images of its evaluation at this step."""
    return folder / "images" / f"eval-{step:06d}.png"


def read_sheet(path: Path) -> tuple[list[str], list[Image.Image]]:
    """Return a sheet's prompts and images; without its layout no prompts and the sheet itself."""
    with Image.open(path) as opened:
        sheet = opened.convert("RGB")
    layout = path.with_name("eval.json")
    if not layout.is_file():
        return [], [sheet]
    held = json.loads(layout.read_text())
    prompts = held["prompts"]
    return prompts, cut_sheet(sheet, len(prompts), tuple(held["size"]), held["num_columns"])


def _fitting(
    both: list[tuple[str, Image.Image, Image.Image]], sides: tuple[int, ...], num_bytes: int
) -> list[Pair]:
    """Encode smaller and smaller; at the smallest side, fewer pairs."""
    for side in sides:
        pairs = [Pair(text, encode(old, side), encode(new, side)) for text, old, new in both]
        if _size(pairs) <= num_bytes:
            return pairs
    while pairs and _size(pairs) > num_bytes:
        pairs = pairs[: len(pairs) // 2]
    return pairs


def _size(pairs: list[Pair]) -> int:
    return sum(len(pair.before) + len(pair.after) + len(pair.prompt) for pair in pairs)


def encode(image: Image.Image, side: int) -> str:
    """Return a data URI: PNG of a tiny picture, else JPEG with at most `side` pixels a side."""
    buffer, kind = io.BytesIO(), "jpeg"
    if image.width <= min(PIXEL_ART, side):
        kind = "png"
        image.save(buffer, "PNG", optimize=True)
    else:
        image = image.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
