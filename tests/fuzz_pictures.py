"""Pictures as files have them: of odd modes, turned, transparent, damaged; and what they show."""

from __future__ import annotations

import random
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fuzzing import flipped, other_than_a_file
from PIL import Image

ORIENTATION = 0x0112
TURNS = {  # EXIF 2.32: stored is the inverse of how it is shown
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: np.rot90(p, 3),
}
BACK = TURNS | {6: TURNS[8], 8: TURNS[6]}  # the others are their own inverse
MODES = {
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "tif": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "F", "F255", "CMYK", "YCbCr", "LAB"),
    "jpg": ("L", "RGB", "CMYK", "YCbCr"),
    "webp": ("RGB", "RGBA"),
    "gif": ("1", "L", "P", "RGB"),
    "bmp": ("1", "L", "P", "RGB", "RGBA"),
    "ppm": ("1", "L", "RGB", "I"),
}
AS_READ = ({"jpg"}, {"CMYK"}, {"YCbCr"}, {"LAB"}, {"gif", "RGB"}, {"bmp", "RGBA"})  # not exact
SIZES = ((1, 1), (4096, 16), (16, 4096), (1, 300), (7, 5), (24, 20), (24, 20), (64, 48))


@dataclass
class Either:
    """It may be refused; read, it is `shown`, or what an independent reader finds in the file."""

    path: Path
    shown: np.ndarray | None = None


def plain(path: Path) -> None:
    Image.new("RGB", (4, 4), "red").save(path)


def picture(mode: str, height: int, width: int, rng: np.random.Generator) -> tuple:
    """Return a picture to store and what it shows, uint8 (height, width, 3)."""
    grey = rng.integers(0, 256, (height, width), np.uint8)
    rgb, alpha = rng.integers(0, 256, (height, width, 3), np.uint8), grey[::-1]
    three = np.repeat(grey[..., None], 3, axis=2)
    if mode == "1":
        return Image.fromarray(grey > 127), np.where(three > 127, 255, 0).astype(np.uint8)
    if mode == "LA":
        return Image.fromarray(np.dstack([grey, alpha])), on_white(three, alpha)
    if mode == "RGBA":
        return Image.fromarray(np.dstack([rgb, alpha])), on_white(rgb, alpha)
    if mode == "P":
        image = Image.fromarray(grey % 16, "L").convert("P")
        palette = rng.integers(0, 256, (16, 3), np.uint8)
        image = Image.frombytes("P", (width, height), (grey % 16).tobytes())
        image.putpalette(palette.tobytes())
        return image, palette[grey % 16]
    if mode in ("I", "I;16", "F", "F255"):
        kind = {"I": np.int32, "I;16": np.uint16}.get(mode, np.float32)
        white = {"F": 1, "F255": 255}.get(mode, 65535)
        values = (grey / 255 * white).astype(kind)
        values.flat[0] = white  # so that a reader knows what white is
        three[0, 0] = 255
        return Image.fromarray(values), three
    image = Image.fromarray(three if mode == "L" else rgb)
    return image.convert("RGB" if mode == "RGB" else mode), np.asarray(image)


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    part = alpha[..., None] / 255
    return np.rint(colours * part + 255 * (1 - part)).astype(np.uint8)


def decoded(path: Path) -> np.ndarray:
    """Read a file's first picture by its own means, turn it and put it over white."""
    with path.open("rb") as file, Image.open(file) as image:  # by a name PIL scrambles some TIFFs
        image.load()
        turn = image.getexif().get(ORIENTATION, 1)
        if image.mode.startswith("I") or image.mode == "F":
            values = np.asarray(image, np.float64)
            white = 65535 if image.mode != "F" else 1 if values.max() <= 1 else 255
            shown = np.repeat((values * 255 / white)[..., None], 3, axis=2)
            assert shown.min() >= 0 and shown.max() <= 255
            if isinstance(hole := image.info.get("transparency"), int):
                shown[values == hole] = 255
        elif image.has_transparency_data:
            rgba = np.asarray(image.convert("RGBA"))
            shown = on_white(rgba[..., :3], rgba[..., 3])
        else:
            shown = np.asarray(image.convert("RGB"))
    return BACK.get(turn, BACK[1])(np.rint(shown).astype(np.uint8))


def compare(found: np.ndarray, truth: np.ndarray | Either) -> None:
    """Raise AssertionError if another picture was read; a rounding may go either way."""
    if isinstance(truth, Either):
        truth = decoded(truth.path) if truth.shown is None else truth.shown
    assert found.dtype == np.uint8 and found.shape == truth.shape, (found.shape, truth.shape)
    assert np.abs(found.astype(int) - truth).max() <= 1, "another picture"


def draw_one(
    draw: random.Random, folder: Path, stem: str
) -> tuple[Path, np.ndarray | Either | None]:
    """Write a picture; return it and what must be read of it, None: it must be refused."""
    suffix = draw.choice(list(MODES))
    path = folder / f"{stem}.{suffix}"
    if suffix == "ppm":
        path = folder / f"{stem}.bmp"  # a reader looks into the file, not at its name
    mode, (height, width) = draw.choice(MODES[suffix]), draw.choice(SIZES)
    image, shown = picture(mode, height, width, np.random.default_rng(draw.randrange(2**32)))
    turn = draw.choice((*TURNS, 0, 9)) if draw.random() < 0.4 else 1
    more = {}
    if suffix in ("png", "tif", "webp", "jpg") and turn != 1:
        more["exif"] = exif = Image.Exif()
        exif[ORIENTATION] = turn
        shown = BACK.get(turn, BACK[1])(shown)
    if suffix == "webp":
        more["lossless"] = more["exact"] = True
    elif suffix == "tif" and mode != "F" and turn in TURNS and draw.random() < 0.5:
        more["compression"] = draw.choice(("tiff_lzw", "tiff_adobe_deflate", "packbits"))
    if suffix in ("gif", "png", "webp", "tif") and draw.random() < 0.15 and mode in ("RGB", "L"):
        rest = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for _ in range(2)]
        more |= {"save_all": True, "append_images": rest}
    image.save(path, "PPM" if suffix == "ppm" else None, **more)
    if any(each <= {suffix, mode} for each in AS_READ):
        shown = decoded(path)
    chance = draw.random()
    if chance < 0.5:
        return path, shown
    return path, damaged(draw, path, shown)


def damaged(draw: random.Random, path: Path, shown: np.ndarray) -> np.ndarray | Either | None:
    """Do something to a picture's file; return what must be read of it then."""
    kind = draw.choice(("cut", "cut", "flip", "flip", "no file", "bomb", "text", "longer", "exif"))
    data = path.read_bytes()
    if kind == "cut":
        path.write_bytes(data[: draw.randrange(len(data))])
        return Either(path, shown)
    if kind == "flip":
        path.write_bytes(flipped(data, draw))
        return Either(path)
    if kind == "longer":
        path.write_bytes(data + b"\0" * draw.randrange(9))
        return Either(path, shown)
    if kind == "exif":
        return broken_exif(draw, path, shown)
    if kind == "no file":
        other_than_a_file(path, draw)
    elif kind == "text":
        odd = (b"", b"\0" * 99, b"<svg/>", b"version https://git-lfs", EPS, b"\x89PNG\r\n\x1a\n")
        path.write_bytes(draw.choice(odd))
    else:
        path.write_bytes(bomb(draw))
    return None


def broken_exif(draw: random.Random, path: Path, shown: np.ndarray) -> Either:
    """Write it anew with an EXIF block that is none, or one with an odd orientation."""
    block = draw.choice((
        b"", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08", b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"\xff" * 50,
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x0299\0\0\0\0\0\0",
    ))  # fmt: skip
    kind = draw.choice(("png", "jpeg", "webp"))
    image = Image.fromarray(shown)
    image.save(path, kind, exif=block, **({"lossless": True} if kind == "webp" else {}))
    return Either(path)


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
showpage
%%EOF
"""


def bomb(draw: random.Random) -> bytes:
    """Return a small file that says it is an enormous picture, or none at all."""
    side = draw.choice((0, 9000, 12_000, 30_000, 2**31 - 1))
    if (kind := draw.choice(("png", "bmp", "gif", "real"))) == "bmp":
        head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
        return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head
    if kind == "gif":
        size = struct.pack("<HH", min(side, 65535), min(side, 65535))
        head = b"GIF89a" + size + b"\x80\0\0" + b"\0" * 6
        return head + b"," + b"\0" * 4 + size + b"\0\2\2D\1\0;"
    side = side if kind == "png" else min(side, 12_000)  # the other one has all its pixels
    rows = b"" if kind == "png" else zlib.compress(bytes((side + 7) // 8 + 1) * side)
    chunks = (b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", rows)
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in (*chunks, (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + name + body
        data += struct.pack(">I", zlib.crc32(name + body))
    return data
