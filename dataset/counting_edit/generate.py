"""Make images of 1 to 4 things, and prompts that ask for another number of them.

    python dataset/counting_edit/generate.py  # the small set in this folder, rendered
    python dataset/counting_edit/generate.py --model FOLDER --out OUT [--pictures 310]
        [--detector FOLDER] [--steps 28 --size 512 ...]

With --model a text-to-image pipeline draws the images. Only those are kept in which the detector
finds the number that was asked for. Further options go to scripts/demo/generate.py, which draws.
"""

from __future__ import annotations

import argparse
import random
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from config.base import base
from dataset.files import write_by_image, write_lines
from flow_grpo import inputs
from flow_grpo.cli import user_errors
from flow_grpo.rewards.rules import geneval_rules
from flow_grpo.rewards.rules.geneval_rules import CLASSES

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
plural = runpy.run_path(str(ROOT / "dataset" / "geneval" / "generate.py"))["plural"]
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
SIZES = ((128, 128), (160, 96))  # width and height of the rendered images
GROUNDS = ((235, 232, 225), (205, 224, 238), (214, 232, 208), (243, 222, 214))
RADII = (13.0, 20.0)  # pixels
GAP = 4.0  # pixels between two things' circles, and to the edge
FINE = 4  # samples a pixel and axis
NUM_TEST = 12  # rendered images, of 48

Layers = list[tuple[np.ndarray, tuple[int, int, int]]]
Rows = list[dict[str, Any]]


def layers(name: str, u: np.ndarray, v: np.ndarray) -> Layers:
    """Draw a thing as (mask, colour) layers. u, v: positions from its centre, in its radius."""
    r = np.hypot(u, v)
    if name == "orange":
        return [(r < 1, (240, 140, 20)), (np.hypot(u, v + 0.8) < 0.15, (60, 120, 40))]
    if name == "donut":
        sprinkles = (np.floor(7 * u) + np.floor(7 * v)) % 4 == 0
        ring = (r < 1) & (r > 0.35)
        return [(ring, (200, 110, 150)), (ring & sprinkles & (r < 0.85), (250, 240, 230))]
    if name == "clock":
        hands = (abs(u) < 0.07) & (v < 0.1) & (v > -0.7) | (abs(v) < 0.07) & (u > -0.1) & (u < 0.5)
        return [(r < 1, (50, 50, 60)), (r < 0.85, (250, 250, 250)), (hands, (50, 50, 60))]
    if name == "stop sign":
        octagon = np.maximum(np.maximum(abs(u), abs(v)), (abs(u) + abs(v)) / 1.41)
        bar = (abs(u) < 0.55) & (abs(v) < 0.16)
        white = (255, 255, 255)
        return [(octagon < 0.95, white), (octagon < 0.85, (200, 20, 30)), (bar, white)]
    if name == "kite":
        diamond = abs(u) / 0.7 + abs(v) < 1
        return [(diamond, (40, 110, 200)), (diamond & (u * v > 0), (250, 200, 40))]
    assert name == "traffic light", name
    lamps = zip((-0.62, 0.0, 0.62), ((230, 40, 40), (240, 200, 40), (40, 190, 80)), strict=True)
    box = [((abs(u) < 0.42) & (abs(v) < 1), (45, 50, 50))]
    return box + [(np.hypot(u, v - at) < 0.25, color) for at, color in lamps]


THINGS = ("orange", "donut", "clock", "stop sign", "kite", "traffic light")


def place(count: int, size: tuple[int, int], rng: random.Random) -> list[tuple[float, ...]]:
    """Throw circles (x, y, radius) that do not touch into an image."""
    circles: list[tuple[float, ...]] = []
    while len(circles) < count:
        circles = []
        for _ in range(60):
            radius = rng.uniform(*RADII)
            x, y = (rng.uniform(radius + GAP, side - radius - GAP) for side in size)
            apart = (np.hypot(x - a, y - b) > radius + other + GAP for a, b, other in circles)
            if len(circles) < count and all(apart):
                circles.append((x, y, radius))
    return circles


def render(name: str, count: int, size: tuple[int, int], rng: random.Random) -> np.ndarray:
    """Render things on plain ground. size: (width, height). Returns uint8 (H, W, 3)."""
    width, height = size
    image = np.full((height * FINE, width * FINE, 3), rng.choice(GROUNDS), np.float64)
    y, x = (np.mgrid[: height * FINE, : width * FINE] + 0.5) / FINE
    for at_x, at_y, radius in place(count, size, rng):
        for mask, color in layers(name, (x - at_x) / radius, (y - at_y) / radius):
            image[mask] = color
    return image.reshape(height, FINE, width, FINE, 3).mean((1, 3)).round().astype(np.uint8)


def edit_rows(name: str, count: int, image: str, drawn_from: str = "") -> Rows:
    """Ask for each other number of things, in GenEval's format.

    drawn_from: the prompt that the image was drawn from, if any.
    """
    more = {"t2i_prompt": drawn_from} if drawn_from else {}
    return [
        {
            "tag": "counting",
            "include": [{"class": name, "count": wanted}],
            "exclude": [{"class": name, "count": wanted + 1}],
            **more,
            "prompt": f"Change the number of {plural(name)} in the picture to {number}.",
            "image": image,
        }
        for wanted, number in NUMBERS.items()
        if wanted != count
    ]


def write_rendered(folder: Path, seed: int = 0) -> None:
    """Write images/ and {train,test}_metadata.jsonl: each thing, number and size once."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: Rows = []
    for name, count, size in product(THINGS, NUMBERS, SIZES):
        image = "images/{}_{}_{}x{}.png".format(name.replace(" ", "_"), count, *size)
        pixels = render(name, count, size, random.Random(f"{seed} {image}"))
        Image.fromarray(pixels).save(folder / image, optimize=True)
        rows += edit_rows(name, count, image)
    write_by_image(folder, rows, NUM_TEST)


def draw_scenes(names: Sequence[str], number: int, rng: random.Random) -> list[tuple[str, int]]:
    """Draw (class, count) pairs, each equally often (+-1)."""
    pairs = list(product(names, NUMBERS))
    whole, rest = divmod(number, len(pairs))
    return pairs * whole + rng.sample(pairs, rest)


def scene_prompt(name: str, count: int) -> str:
    return f"a photo of {NUMBERS[count]} {plural(name) if count > 1 else name}"


def confirmed(pictures: Sequence[Path], scenes: Sequence[tuple[str, int]], detect: Callable):
    """Yield the (image, class, count) of those that show as many things as they should.

    detect: as flow_grpo.rewards.rules.detector.Detector; as sure as GenEval's counting asks for.
    """
    for picture, (name, count) in zip(pictures, scenes, strict=True):
        (found,) = detect([inputs.picture(picture)])
        if len(geneval_rules.keep(found, "counting").get(name, [])) == count:
            yield picture, name, count


def write_drawn(args: argparse.Namespace, options: Sequence[str]) -> None:
    """Let a pipeline draw, keep what the detector confirms, write the set. Raises ValueError."""
    check(args)
    scenes = draw_scenes(args.classes, args.pictures, random.Random(args.seed))
    drawn = args.out / "drawn"
    drawn.mkdir(parents=True, exist_ok=True)
    write_lines(drawn / "prompts.txt", (scene_prompt(*scene) for scene in scenes))
    script = str(ROOT / "scripts" / "demo" / "generate.py")
    command = ["--model", args.model, "--prompts", drawn / "prompts.txt", "--out", drawn]
    command += ["--seed", args.seed, *options]
    if subprocess.run([sys.executable, script, *map(str, command)]).returncode:
        raise ValueError(f"--model={args.model}: nothing was drawn; the reason stands above.")

    import torch

    from flow_grpo.rewards.rules.detector import Detector

    detect = Detector(args.detector, "cuda" if torch.cuda.is_available() else "cpu")
    (args.out / "images").mkdir(exist_ok=True)
    rows: Rows = []
    pictures = [drawn / f"{n:04d}.png" for n in range(len(scenes))]
    for picture, name, count in confirmed(pictures, scenes, detect):
        shutil.copy(picture, args.out / "images")
        rows += edit_rows(name, count, f"images/{picture.name}", scene_prompt(name, count))
    num_kept = len({row["image"] for row in rows})
    print(f"{num_kept} of {len(scenes)} images show as many things as they should")
    if num_kept <= args.test:
        raise ValueError(
            f"--pictures={args.pictures} and --test={args.test}: {num_kept} images were "
            f"confirmed, more than --test are needed. Draw more, or with a better --model."
        )
    write_by_image(args.out, rows, args.test)


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for what can't be drawn or counted."""
    unknown = [name for name in args.classes if name not in CLASSES]
    if unknown or not args.classes:
        raise ValueError(f"--classes: {unknown} are none of the detector's {', '.join(CLASSES)}.")
    if not 1 <= args.test < args.pictures <= 9999:
        raise ValueError(
            f"--test={args.test} and --pictures={args.pictures}: at least 1, and less than "
            f"--pictures, which is at most 9999, is needed."
        )
    if args.out is None:
        raise ValueError("--out: a folder is needed for the images that --model draws.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="a text-to-image pipeline's folder or hub id")
    parser.add_argument("--detector", default=base(None).rewards.geneval_detector)
    parser.add_argument("--classes", nargs="+", default=list(CLASSES), help="of COCO's 80")
    parser.add_argument("--pictures", type=int, default=310, help="to draw")
    parser.add_argument("--test", type=int, default=30, help="images that are held out")
    parser.add_argument("--out", type=Path)
    args, options = parser.parse_known_args()
    if args.model:
        with user_errors():
            write_drawn(args, options)
    elif options:
        parser.error(f"without --model there is no {' '.join(options)}")
    else:
        write_rendered(args.out or FOLDER, args.seed)
