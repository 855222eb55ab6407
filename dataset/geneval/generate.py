"""Write GenEval-style prompts: test_metadata.jsonl and train_metadata.jsonl (50,000 rows).

Run as `python dataset/geneval/generate.py`. Which prompts are for testing is fixed; --seed draws
the training rows. --exclude FILE keeps the scenes of another test set out of them, such as those
of the benchmark's own evaluation_metadata.jsonl.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Iterator
from itertools import islice, permutations, product
from pathlib import Path
from typing import Any

from dataset.files import write_rows
from flow_grpo import inputs
from flow_grpo.cli import user_errors
from flow_grpo.rewards.rules.geneval_rules import CLASSES, COLORS, RELATIONS, check_row

FOLDER = Path(__file__).parent
TEST = {  # distinct prompts of each tag, as many as the benchmark has
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
TEST_COPIES = 4  # rows of each prompt; each is its own noise
TRAIN = {  # rows: shares of .7, .5, .3, .1 and .1, out of their sum, of 50,000
    "position": 20_588,
    "counting": 14_706,
    "color_attr": 8_824,
    "colors": 2_941,
    "two_object": 2_941,
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
MIRRORED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PAIRS = ("skis", "scissors")  # one thing to the detector
PLURALS = {
    "person": "people",
    "sheep": "sheep",
    "knife": "knives",
    "broccoli": "heads of broccoli",
    "computer mouse": "computer mice",
    **{name: f"pairs of {name}" for name in PAIRS},
}
PAINTED = [name for name in CLASSES if name != "person"]  # what colors are asked of

Row = dict[str, Any]


def named(name: str, color: str = "") -> str:
    """Put the article before a thing: "a car", "an orange car", "a pair of blue skis"."""
    words = f"{color} {name}".strip()
    if name in PAIRS:
        return f"a pair of {words}"
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plural(name: str) -> str:
    return PLURALS.get(name, name + ("es" if name.endswith(("s", "ch", "sh")) else "s"))


def scenes(tag: str) -> list[tuple]:
    """List every scene of a tag, as the arguments of its line in `row`."""
    if tag == "single_object":
        return [(name,) for name in CLASSES]
    if tag == "two_object":
        return list(permutations(CLASSES, 2))
    if tag == "counting":
        return list(product(CLASSES, NUMBERS))
    if tag == "colors":
        return list(product(PAINTED, COLORS))
    if tag == "position":
        return [(a, relation, b) for a, b in permutations(CLASSES, 2) for relation in RELATIONS]
    pairs = product(permutations(PAINTED, 2), permutations(COLORS, 2))
    return [(a, color_a, b, color_b) for (a, b), (color_a, color_b) in pairs]


def row(tag: str, scene: tuple) -> Row:
    """Write a scene as a row of GenEval's metadata (arXiv:2310.11513)."""
    exclude = []
    match tag, scene:
        case "counting", (name, n):
            include = [{"class": name, "count": n}]
            exclude = [{"class": name, "count": n + 1}]
            text = f"{NUMBERS[n]} {plural(name)}"
        case "colors", (name, color):
            include = [{"class": name, "count": 1, "color": color}]
            text = named(name, color)
        case "position", (a, relation, b):  # "a" stands second, since it refers to "b"
            include = [{"class": b, "count": 1}]
            include += [{"class": a, "count": 1, "position": [relation, 0]}]
            text = f"{named(a)} {relation} {named(b)}"
        case "color_attr", (a, color_a, b, color_b):
            include = [{"class": a, "count": 1, "color": color_a}]
            include += [{"class": b, "count": 1, "color": color_b}]
            text = f"{named(a, color_a)} and {named(b, color_b)}"
        case _:
            include = [{"class": name, "count": 1} for name in scene]
            text = " and ".join(named(name) for name in scene)
    more = {"exclude": exclude} if exclude else {}
    return {"tag": tag, "include": include, **more, "prompt": f"a photo of {text}"}


def scene_key(row: Row) -> tuple:
    """Name what a row asks for, the same for "A left of B" and "B right of A", "A and B" and back.

    No held-out scene is trained on under its other name.
    """
    things = [(c["class"], c["count"], c.get("color", "")) for c in row["include"]]
    relation = row["include"][-1].get("position", ("",))[0]  # of the last thing to the first
    if things != sorted(things):
        things, relation = things[::-1], MIRRORED.get(relation, relation)
    return row["tag"], relation, *things


def draw(tag: str, num_rows: int, held_out: set[tuple], rng: random.Random) -> list[Row]:
    """Draw rows of a tag that are not held out, its prompts equally often (+-1)."""
    pool = scenes(tag)
    rng.shuffle(pool)
    allowed = (one for scene in pool if scene_key(one := row(tag, scene)) not in held_out)
    rows = list(islice(allowed, num_rows))
    return [rows[n % len(rows)] for n in range(num_rows)]


def test_rows() -> list[Row]:
    """Return the test split: the same for every seed, shuffled, one copy of all after another."""
    rng = random.Random("geneval test")
    rows = [one for tag, num_rows in TEST.items() for one in draw(tag, num_rows, set(), rng)]
    rng.shuffle(rows)
    return rows * TEST_COPIES


def train_rows(seed: int, held_out: Iterable[Row]) -> list[Row]:
    """Return 50,000 rows of scenes that none of the `held_out` rows asks for."""
    rng, keys = random.Random(f"geneval train {seed}"), {scene_key(one) for one in held_out}
    rows = [one for tag, num_rows in TRAIN.items() for one in draw(tag, num_rows, keys, rng)]
    rng.shuffle(rows)
    return rows


def read_excluded(path: Path) -> Iterator[Row]:
    """Read the rows of another test set. Raises ValueError if they are not GenEval's."""
    if not path.is_file():
        raise ValueError(f"--exclude={path}: can't be read (there is no such file).")
    for where, one in inputs.json_lines(path):
        try:
            check_row(one)
            scene_key(one)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"--exclude={where}: not a row of GenEval's metadata ({error})."
            ) from None
        yield one


def write(folder: Path, seed: int = 0, exclude: Iterable[Row] = ()) -> None:
    """Write {test,train}_metadata.jsonl into `folder`."""
    test = test_rows()
    for split, rows in (("test", test), ("train", train_rows(seed, [*test, *exclude]))):
        write_rows(folder / f"{split}_metadata.jsonl", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="draws the training rows")
    parser.add_argument("--exclude", type=Path, action="append", default=[], metavar="FILE")
    args = parser.parse_args()
    with user_errors():
        excluded = [one for path in args.exclude for one in read_excluded(path)]
    write(FOLDER, args.seed, excluded)
