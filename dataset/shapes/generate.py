"""Write the prompts of the shapes world: train, dev and test, in GenEval's row format.

Run as `python dataset/shapes/generate.py`. The rows depend on --seed; which prompt is in which
split does not.
"""

import argparse
import hashlib
import json
import random
from itertools import permutations, product
from pathlib import Path
from typing import Any

from flow_grpo.rewards.rules.shapes import COLORS, RELATIONS, SHAPES

NUMBERS = {2: "two", 3: "three", 4: "four"}
MIRRORED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
ROWS = {"train": 500, "dev": 50, "test": 100}  # per tag
# Distinct prompts that are held out, per tag; all others are for training.
HELD_OUT = {
    "single": {"test": 32, "dev": 16},  # of 96
    "count": {"test": 32, "dev": 16},  # of 96
    "two": {"test": 100, "dev": 50},  # of 992
    "position": {"test": 100, "dev": 50},  # of 3,968
}

Row = dict[str, Any]


def _name(*words: str) -> str:
    """Put the article before the words: "a red circle", "an orange circle"."""
    return " ".join(("an" if words[0] == "orange" else "a", *words))


def _include(color: str, shape: str, count: int = 1) -> dict[str, Any]:
    return {"class": shape, "count": count, "color": color}


def single_rows() -> list[Row]:
    """List "a red circle", "a small red circle", "a large red circle" for all kinds."""
    rows = []
    for color, shape, size in product(COLORS, SHAPES, (None, "small", "large")):
        include = _include(color, shape) | ({"size": size} if size else {})
        prompt = _name(size, color, shape) if size else _name(color, shape)
        rows.append({"tag": "single", "include": [include], "prompt": prompt})
    return rows


def count_rows() -> list[Row]:
    """List "two red circles" to "four red circles" for all kinds."""
    return [
        {
            "tag": "count",
            "include": [_include(color, shape, n)],
            "prompt": f"{word} {color} {shape}s",
        }
        for color, shape, (n, word) in product(COLORS, SHAPES, NUMBERS.items())
    ]


def pair_rows() -> list[Row]:
    """List "a red circle and a blue square" and its four relations for all ordered pairs."""
    rows = []
    for first, second in permutations(product(COLORS, SHAPES), 2):
        include = [_include(*first), _include(*second)]
        a, b = _name(*first), _name(*second)
        rows.append({"tag": "two", "include": include, "prompt": f"{a} and {b}"})
        for relation in RELATIONS:
            prompt = f"{a} {relation} {b}"
            rows.append(
                {"tag": "position", "include": include, "relation": relation, "prompt": prompt}
            )
    return rows


def scene_key(row: Row) -> str:
    """Name the scene a row asks for, the same for "A left of B" and "B right of A".

    Splits are cut by a hash of it, so that no held-out scene is trained on under its other name.
    """
    names = [" ".join(str(value) for value in include.values()) for include in row["include"]]
    relation = row.get("relation", row["tag"])
    if names != sorted(names):
        names, relation = names[::-1], MIRRORED.get(relation, relation)
    return f" {relation} ".join(names)


def split_prompts() -> dict[str, dict[str, list[Row]]]:
    """Return every distinct prompt as {split: {tag: rows}}, rows in the order of their hashes."""
    rows = single_rows() + count_rows() + pair_rows()
    splits: dict[str, dict[str, list[Row]]] = {split: {} for split in ROWS}
    for tag, held_out in HELD_OUT.items():
        ranked = sorted(
            (row for row in rows if row["tag"] == tag),
            key=lambda row: (hashlib.sha256(scene_key(row).encode()).hexdigest(), row["prompt"]),
        )
        num_test, num_dev = held_out["test"], held_out["dev"]
        splits["test"][tag] = ranked[:num_test]
        splits["dev"][tag] = ranked[num_test : num_test + num_dev]
        splits["train"][tag] = ranked[num_test + num_dev :]
    return splits


def draw_rows(pools: dict[str, list[Row]], num_per_tag: int, rng: random.Random) -> list[Row]:
    """Draw `num_per_tag` rows of each tag, its prompts equally often (+-1), and shuffle them."""
    rows = []
    for pool in pools.values():
        whole, rest = divmod(num_per_tag, len(pool))
        rows += pool * whole + rng.sample(pool, rest)
    rng.shuffle(rows)
    return rows


def write(folder: Path, seed: int = 0) -> None:
    """Write {train,dev,test}_metadata.jsonl into `folder`."""
    for split, pools in split_prompts().items():
        rows = draw_rows(pools, ROWS[split], random.Random(f"{seed} {split}"))
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}_metadata.jsonl").write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seed", type=int, default=0, help="draws and shuffles the rows; the splits are fixed"
    )
    write(Path(__file__).parent, parser.parse_args().seed)
