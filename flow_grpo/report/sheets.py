"""Sheets of images: bare ones that can be cut again, and captioned ones for a person."""

from __future__ import annotations

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_HEIGHT, MAX_HEIGHT = 128, 384  # pixels of a tile on the sheet
GAP, FONT_SIZE, LINE_HEIGHT = 6, 11, 14
LETTER_WIDTH = 6.3  # pixels; less would touch the next caption
MAX_LINES = 5
CONTACT_GAP = 2  # pixels, before magnification


def contact_sheet(images: list[np.ndarray], num_columns: int) -> Image.Image:
    """Lay uint8 (H, W, 3) images of one size out in rows; small ones are magnified."""
    height, width, _ = images[0].shape
    num_rows, gap = -(-len(images) // num_columns), CONTACT_GAP
    sheet = np.full(
        (num_rows * (height + gap) + gap, num_columns * (width + gap) + gap, 3), 128, np.uint8
    )
    for number, image in enumerate(images):
        row, column = divmod(number, num_columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        sheet[top : top + height, left : left + width] = image
    scale = max(1, 96 // width)
    return Image.fromarray(sheet).resize(
        (sheet.shape[1] * scale, sheet.shape[0] * scale), Image.Resampling.NEAREST
    )


def cut_sheet(
    sheet: Image.Image, num_images: int, size: tuple[int, int], num_columns: int
) -> list[Image.Image]:
    """Return a contact sheet's images, unmagnified. size: of one, (height, width)."""
    (height, width), gap = size, CONTACT_GAP
    scale = sheet.width // (num_columns * (width + gap) + gap)
    sheet = sheet.resize((sheet.width // scale, sheet.height // scale), Image.Resampling.NEAREST)
    places = (divmod(number, num_columns) for number in range(num_images))
    corners = ((gap + col * (width + gap), gap + row * (height + gap)) for row, col in places)
    return [sheet.crop((left, top, left + width, top + height)) for left, top in corners]


def captioned_sheet(images: list[np.ndarray], captions: list[str], num_columns: int) -> Image.Image:
    """Lay images of one size out in rows, each with its caption.

    images: uint8 (H, W, 3), or (F, H, W, 3) of which the middle frame is shown. captions: one
    each; a long one is cut to MAX_LINES.
    """
    tiles = [_tile(image) for image in images]
    width, height = tiles[0].size
    texts = [_wrap(caption, width) for caption in captions]
    cell_height = height + max(map(len, texts)) * LINE_HEIGHT + 2 * GAP
    num_columns = min(num_columns, len(tiles))
    num_rows = -(-len(tiles) // num_columns)
    size = (num_columns * (width + GAP) + GAP, num_rows * cell_height + GAP)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for number, (tile, lines) in enumerate(zip(tiles, texts, strict=True)):
        row, column = divmod(number, num_columns)
        left, top = GAP + column * (width + GAP), GAP + row * cell_height
        sheet.paste(tile, (left, top))
        for i, line in enumerate(lines):
            pen.text((left, top + height + 2 + i * LINE_HEIGHT), line, "black", font)
    return sheet


def side_by_side(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Join two images of equal size, uint8 ([F,] H, W, 3), with a white line between them."""
    line = np.full((*first.shape[:-2], max(1, first.shape[-2] // 64), 3), 255, np.uint8)
    return np.concatenate([first, line, second], axis=-2)


def _tile(image: np.ndarray) -> Image.Image:
    tile = Image.fromarray(image if image.ndim == 3 else image[len(image) // 2])
    if tile.height > MAX_HEIGHT:
        return tile.resize((round(tile.width * MAX_HEIGHT / tile.height), MAX_HEIGHT))
    scale = max(1, MIN_HEIGHT // tile.height)
    return tile.resize((tile.width * scale, tile.height * scale), Image.Resampling.NEAREST)


def _wrap(caption: str, width: int) -> list[str]:
    letters = max(8, int(width / LETTER_WIDTH))
    lines = [part for line in caption.split("\n") for part in textwrap.wrap(line, letters)]
    if len(lines) <= MAX_LINES:
        return lines
    *_, last = caption.split("\n")  # the scores stay
    return [*lines[: MAX_LINES - 2], lines[MAX_LINES - 2][:-1] + "…", last[:letters]]
