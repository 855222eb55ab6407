"""What a user brings, read in one way by training, rewards and tools: text, rows, pictures."""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, ImageSequence

MARKS = "\ufeff\u200b\0"  # the byte order mark, a space without width, NUL: none can be seen
EDGES = MARKS + "".join(c for c in map(chr, range(0x3001)) if c.isspace())
MAX_DEPTH = 64  # of a row's lists and objects
MEAN_OF_TAGS = "mean_of_tags"  # stands where a tag does: each tag counts alike, as in GenEval
ALL = "all"  # likewise: all rows

MAX_PIXELS = 2**26  # of a picture; decoded and turned they take 0.5 GiB
PROGRAMS = ("EPS",)  # PIL hands it to Ghostscript

JPEG_END = b"\xff\xd9"
WHOLE = ("PNG", "JPEG", "WEBP")  # which show without decoding that they were cut; of JPEG the end
ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")  # other formats' further pictures are no frames
TURNED = re.compile(rb"exif|adobe\.xmp", re.IGNORECASE)  # where a PNG may say that it is


def text(path: Path) -> str:
    """Read UTF-8 without a byte order mark. Raises ValueError naming the file."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError("it is no regular file")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from None
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error}).") from None


def lines(path: Path) -> list[tuple[str, str]]:
    """Return where each line stands and the line, less what can't be seen at its ends.

    A line ends at a line feed, a carriage return or both, not at U+2028, a form feed or the like.
    One in which nothing can be seen is left out. Raises ValueError naming the file and the line.
    """
    found = enumerate(text(path).split("\n"), start=1)
    kept = [(f"{path}, line {n}", line.strip(EDGES)) for n, line in found if is_seen(line)]
    for where, line in kept:
        if "\0" in line:
            raise ValueError(f"{where}: NUL in {line!r:.60}. Save the file as UTF-8 text.")
    return kept


def is_seen(line: str) -> bool:
    """Tell whether a line has more than spaces and characters of format and control."""
    return not all(c.isspace() or unicodedata.category(c) in ("Cf", "Cc") for c in line)


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield where each line stands and its value. Raises ValueError if no JSON file can have it."""
    for where, line in lines(path):
        try:
            value = json.loads(line, object_pairs_hook=_once)
            if line.count("[") + line.count("{") > MAX_DEPTH:
                _limit(value, MAX_DEPTH)
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except RecursionError:
            raise ValueError(
                f"{where}: lists and objects in one another, more than {MAX_DEPTH} deep. Flatten "
                f"them: {line:.60}"
            ) from None
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: half of a surrogate pair, {error.object[error.start]!r}, is no text. "
                f"Write the whole character."
            ) from None
        except ValueError as error:  # NaN and infinities too
            raise ValueError(f"{where}: not JSON ({error}): {line:.60}") from None
        yield where, value


def json_object(path: Path) -> dict:
    """Read a file that is one JSON object. Raises ValueError naming the file."""
    try:
        value = json.loads(text(path))
    except RecursionError:
        value = "too deep"
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged, not JSON ({error}). Fetch it again.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: an object is needed, not {value!r:.60}.")
    return value


def rows(path: Path, key: str) -> Iterator[tuple[str, dict, list[Path]]]:
    """Read an object a line: yield where it stands, the object, and the images that it names.

    key: of a text that each needs. "prompt": a text, where it is there. "image": one path, or a
    list, from the file's folder. "tag": see tag_of. Raises ValueError naming the file and the line.
    """
    for where, row in json_lines(path):
        given = row if isinstance(row, dict) else {}
        texts = {key: given.get(key)}
        if given.get("prompt") is not None:
            texts["prompt"] = given["prompt"]
        for name, value in texts.items():
            if not isinstance(value, str) or not is_seen(value) or "\0" in value.strip(MARKS):
                raise ValueError(
                    f'{where}: an object with a "{name}" text is needed, not {row!r:.80}.'
                )
        named = row.get("image", [])
        names = [named] if isinstance(named, str) else named
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f'{where}: "image" must be a path or a list of paths, not {named!r:.60}.'
            )
        tag = tag_of(row)
        if tag in (ALL, MEAN_OF_TAGS) or len((tag + ".").splitlines()) > 1:
            raise ValueError(
                f'{where}: "tag": {tag!r:.60} can\'t head a column: {ALL} and {MEAN_OF_TAGS} have '
                f"theirs, and a tag is one line. Rename it."
            )
        yield where, row, [path.parent / name for name in names]


def tag_of(row: Mapping) -> str:
    """Return the kind of prompt that a row says it is; "" if it says null or nothing."""
    tag = row.get("tag")
    return "" if tag is None or not is_seen(str(tag)) else str(tag).strip(MARKS)


def picture(path: str | Path) -> np.ndarray:
    """Read a picture as a person sees it: uint8 (H, W, 3), of an animated one the first frame.

    Turned as EXIF says; 16 bits and floats (1 is white, or 255 where one is above 1) are scaled;
    what is transparent shows white. Raises ValueError naming the file.
    """
    with opened(path) as image:
        return pixels(image)


def size(path: str | Path) -> tuple[int, int]:
    """Return a picture's (width, height) as picture() gives it. Raises ValueError if it was cut."""
    with opened(path) as image:
        kind = image.format
        if kind not in WHOLE:
            height, width, _ = [each.shape for each in frames(image)][0]
            return width, height
        image.verify()  # checksums, where the format has some; JPEG has none
        with open(path, "rb") as file:
            if kind == "JPEG":  # some cameras write a little behind its end
                file.seek(max(os.path.getsize(path) - 4096, 0))
                if JPEG_END not in file.read():
                    raise OSError("its end is missing")
            look = kind != "PNG" or TURNED.search(file.read())  # a PNG is decoded for it
    with opened(path) as image:
        turned = look and image.getexif().get(0x0112, 1) in range(5, 9)  # by a quarter
        return image.size[::-1] if turned else image.size


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """Open a picture; whatever is wrong with it is a ValueError that names it."""
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise OSError("there is no such file, or it is none of bytes")
        # By its name PIL would map a TIFF into memory, and scramble one that is turned.
        with open(path, "rb") as file, Image.open(file) as image:
            if image.format in PROGRAMS:
                raise OSError(f"{image.format} is a program that would be run")
            if math.prod(image.size) > MAX_PIXELS:
                raise OSError("{} x {} pixels, more than {:,}".format(*image.size, MAX_PIXELS))
            yield image
    except Exception as error:  # of many kinds
        raise ValueError(f"cannot read the image {path} ({error}).") from None


def frames(image: Image.Image) -> Iterator[np.ndarray]:
    """Yield the frames of an animated picture that is open, or its first picture."""
    if image.format not in ANIMATED:
        return map(pixels, (image,))
    if (count := getattr(image, "n_frames", 1)) * math.prod(image.size) > 16 * MAX_PIXELS:
        raise ValueError("{} frames of {} x {} pixels are too many".format(count, *image.size))
    return map(pixels, ImageSequence.Iterator(image))


def pixels(frame: Image.Image) -> np.ndarray:
    """Return what picture() does of the frame that is open."""
    image = ImageOps.exif_transpose(frame)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image, np.float64)
    white = 65535 if image.mode != "F" else 1 if values.max() <= 1 else 255
    if not (values.min() >= 0 and values.max() <= white):  # NaN too
        raise ValueError(
            f"its values are {values.min():g} to {values.max():g}; 8 or 16 bits, or floats from 0 "
            f"to 1 or 255, are needed"
        )
    scaled = Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
    if isinstance(hole := image.info.get("transparency"), int):  # the one value that is none
        scaled.putalpha(Image.fromarray(np.where(values == hole, 0, 255).astype(np.uint8)))
    return scaled


def _once(pairs: list[tuple[str, Any]]) -> dict:
    """Make an object whose keys stand once each; readers differ in which of two counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for n, (key, _) in enumerate(pairs) if key in dict(pairs[:n]))
        raise ValueError(f"the key {twice!r:.60} stands twice")
    return found


def _limit(value: Any, left: int) -> None:
    """Raise RecursionError if lists and objects lie in one another more than `left` deep."""
    if isinstance(value, (dict, list)):
        if not left:
            raise RecursionError
        for each in value.values() if isinstance(value, dict) else value:
            _limit(each, left - 1)
