"""Sheets of images: bare ones that can be cut again, and captioned ones for a person."""

from __future__ import annotations

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

MIN_HEIGHT, MAX_HEIGHT = 128, 384  # pixels of a tile on the sheet
GAP, FONT_SIZE, LINE_HEIGHT = 6, 11, 14
LETTER_WIDTH = 6.3  # pixels; less would touch the next caption
MAX_LINES = 5
CONTACT_GAP = 2  # pixels, before magnification


def contact_sheet(images: list[np.ndarray], num_columns: int) -> Image.Image:
    """Lay uint8 (H, W, 3) images out in rows, in cells of the largest; small ones are magnified."""
    height, width = cell(images)
    size, corners = _grid(len(images), num_columns, width, height, CONTACT_GAP)
    sheet = Image.new("RGB", size, (128, 128, 128))
    for image, corner in zip(images, corners, strict=True):
        sheet.paste(Image.fromarray(image), corner)
    return ImageOps.scale(sheet, max(1, 96 // width), Image.Resampling.NEAREST)


def cell(images: list[np.ndarray]) -> tuple[int, int]:
    """Return the (height, width) that holds each of uint8 ([F,] H, W, 3)."""
    return max(image.shape[-3] for image in images), max(image.shape[-2] for image in images)


def cut_sheet(
    sheet: Image.Image, num_images: int, size: tuple[int, int], num_columns: int
) -> list[Image.Image]:
    """Return a contact sheet's images, unmagnified. size: cell() of them."""
    height, width = size
    whole, corners = _grid(num_images, num_columns, width, height, CONTACT_GAP)
    sheet = sheet.resize(whole, Image.Resampling.NEAREST)
    return [sheet.crop((left, top, left + width, top + height)) for left, top in corners]


def captioned_sheet(images: list[np.ndarray], captions: list[str], num_columns: int) -> Image.Image:
    """Lay images out in rows, each with its caption.

    images: uint8 (H, W, 3), or (F, H, W, 3) of which the middle frame is shown. A long caption is
    cut to MAX_LINES.
    """
    tiles = [_tile(image) for image in images]
    width, height = (max(tile.size[axis] for tile in tiles) for axis in (0, 1))
    texts = [_wrap(caption, width) for caption in captions]
    cell_height = height + GAP + max(map(len, texts)) * LINE_HEIGHT
    num_columns = min(num_columns, len(tiles))
    size, corners = _grid(len(tiles), num_columns, width, cell_height, GAP)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for tile, lines, (left, top) in zip(tiles, texts, corners, strict=True):
        sheet.paste(tile, (left, top))
        for i, line in enumerate(lines):
            pen.text((left, top + height + 2 + i * LINE_HEIGHT), line, "black", font)
    return sheet


def side_by_side(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Join two images of equal size, uint8 ([F,] H, W, 3), with a white line between them."""
    line = np.full((*first.shape[:-2], max(1, first.shape[-2] // 64), 3), 255, np.uint8)
    return np.concatenate([first, line, second], axis=-2)


def _grid(
    count: int, num_columns: int, width: int, height: int, gap: int
) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Return the size of a sheet of cells, (width, height), and each cell's (left, top)."""
    across, down = width + gap, height + gap
    places = (divmod(number, num_columns) for number in range(count))
    size = (num_columns * across + gap, -(-count // num_columns) * down + gap)
    return size, [(gap + column * across, gap + row * down) for row, column in places]


def _tile(image: np.ndarray) -> Image.Image:
    tile = Image.fromarray(image if image.ndim == 3 else image[len(image) // 2])
    if tile.height > MAX_HEIGHT:
        return tile.resize((round(tile.width * MAX_HEIGHT / tile.height), MAX_HEIGHT))
    return ImageOps.scale(tile, max(1, MIN_HEIGHT // tile.height), Image.Resampling.NEAREST)


def _wrap(caption: str, width: int) -> list[str]:
    letters = max(8, int(width / LETTER_WIDTH))
    lines = [part for line in caption.split("\n") for part in textwrap.wrap(line, letters)]
    if len(lines) <= MAX_LINES:
        return lines
    *_, last = caption.split("\n")  # the scores stay
    return [*lines[: MAX_LINES - 2], lines[MAX_LINES - 2][:-1] + "…", last[:letters]]
