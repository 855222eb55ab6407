"""Measure an OCR engine as a reward: the score of images that show exactly what is asked.

python scripts/benchmark/ocr.py [--engine rapidocr] [--side 384] [--write FOLDER]

60 images of 512 x 512 from a fixed seed: 1 to 5 words in one of 8 fonts, 28 to 72 pixels high,
on plain, graded or noisy ground, some rotated by up to 8 degrees or blurred.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from config.base import base
from flow_grpo.rewards import loading
from flow_grpo.rewards.batch import Batch

SIDE, NUM_PICTURES = 512, 60
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold",
    "DejaVuSansMono", "STIXGeneral", "STIXGeneralBol",
)  # fmt: skip
WORDS = (
    "open market fresh bread coffee house never sleeps stay hungry library seven river street "
    "grand hotel exit forward quiet please summer sale track nine museum garden light music"
).split()


def draw(number: int) -> tuple[np.ndarray, str]:
    """Draw one picture. Returns uint8 (512, 512, 3) and its text."""
    rng = random.Random(number)
    words = rng.sample(WORDS, rng.randint(1, 5))
    style = rng.choice((str.upper, str.title, str.lower))
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    font = ImageFont.truetype(folder / f"{rng.choice(FONTS)}.ttf", rng.randint(28, 72))
    lines = [""]
    for word in map(style, words):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) < 440 or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).multiline_text(
        (SIDE / 2, SIDE / 2), "\n".join(lines), 255, font, anchor="mm", align="center"
    )
    if rng.random() < 0.3:
        mask = mask.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC)
    light = [rng.randint(190, 255) for _ in range(3)]
    dark = [rng.randint(0, 70) for _ in range(3)]
    ground, ink = (light, dark) if rng.random() < 0.6 else (dark, light)
    picture = Image.composite(Image.new("RGB", mask.size, tuple(ink)), _ground(ground, rng), mask)
    if rng.random() < 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 1.5)))
    return np.asarray(picture), " ".join(map(style, words))


def _ground(color: list[int], rng: random.Random) -> Image.Image:
    pixels = np.full((SIDE, SIDE, 3), color, np.float64)
    kind = rng.choice(("plain", "graded", "noisy"))
    if kind == "graded":
        pixels += np.linspace(-40, 40, SIDE)[:, None, None]
    elif kind == "noisy":
        pixels += np.random.default_rng(rng.randint(0, 2**32)).normal(0, 15, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def main() -> None:
    """Print the mean score, how many are perfect, the time, and what was misread."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="rapidocr")
    parser.add_argument("--side", type=int, default=base(None).rewards.ocr_side)
    parser.add_argument("--write", type=Path, help="put the pictures there")
    args = parser.parse_args()
    settings = loading.settings(base(None))
    settings |= {"ocr_engine": args.engine, "ocr_side": args.side, "ocr_processes": 1}
    pictures, texts = zip(*map(draw, range(NUM_PICTURES)), strict=True)
    prompts = [f'a sign that says "{text}"' for text in texts]
    loading.check("ocr", settings, prompts, [{}] * NUM_PICTURES)
    scorer = loading.load("ocr", settings, "cpu")
    scorer(Batch(list(pictures[:1]), prompts[:1], [{}]))  # starts the process
    start = time.perf_counter()
    scores = scorer(Batch(list(pictures), prompts, [{}] * NUM_PICTURES))["ocr"]
    milliseconds = 1000 * (time.perf_counter() - start) / NUM_PICTURES
    scorer.close()
    for number, picture in enumerate(pictures if args.write else ()):
        args.write.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(args.write / f"{number:02}.png")
    for number in np.flatnonzero(scores < 1):
        print(f"{scores[number]:.3f}  picture {number}: {texts[number]}")
    perfect = int((scores == 1).sum())
    print(
        f"{args.engine}, side {args.side}: mean {scores.mean():.4f}, perfect {perfect} of "
        f"{NUM_PICTURES}, least {scores.min():.3f}, {milliseconds:.0f} ms a picture"
    )


if __name__ == "__main__":
    main()
