"""Write prompts that quote a text to be drawn: train.txt and test.txt, from grammar.txt alone.

Run as `python dataset/ocr/generate.py`. The prompts depend on --seed; which quoted texts and which
surroundings belong to which split does not.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import re
from collections import Counter
from pathlib import Path

from dataset.files import write_lines
from flow_grpo.rewards.rules.ocr import plain

FOLDER = Path(__file__).parent
PROMPTS = {"train": 20_000, "test": 1_000}
TEST_SHARE = 10  # one text of so many, and one surrounding, belongs to the test split
REPEATS = {"train": 8, "test": 2}  # how often a quoted text may come
LENGTHS = range(2, 33)  # of a quoted text, in characters without spaces
CAPITALS = 0.3  # of the texts are in capitals; half of the others start each word with one

Grammar = dict[str, list[str]]


def read_grammar(path: Path = FOLDER / "grammar.txt") -> Grammar:
    """Read {name: alternatives}."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rules = [line.split(":", 1) for line in lines if line and not line.startswith("#")]
    return {name: [one.strip() for one in text.split(" | ")] for name, text in rules}


def expand(grammar: Grammar, text: str, rng: random.Random) -> str:
    """Replace every {name} and {first-last} of a text, but {text}, until none is left."""

    def one(slot: re.Match) -> str:
        if slot[2]:
            return str(rng.randint(int(slot[2]), int(slot[3])))
        return expand(grammar, rng.choice(grammar[slot[1]]), rng)

    return re.sub(r"\{(?!text\})(?:([a-z_]+)|(\d+)-(\d+))\}", one, text)


def draw_target(grammar: Grammar, surface: str, rng: random.Random) -> str:
    """Draw a text of the kind that stands on a surface, in one of three ways of capitals."""
    text = expand(grammar, f"{{{surface}_text}}", rng)
    if rng.random() < CAPITALS:
        return text.upper()
    if rng.random() < 0.5:
        return re.sub(r"(?<![\w'])(?<!\d )[a-z]", lambda first: first[0].upper(), text)
    return text[0].upper() + text[1:]


def draw_carrier(grammar: Grammar, surface: str, rng: random.Random) -> str:
    """Draw the rest of a prompt; {text} marks where the quoted text stands."""
    frame = rng.choice(grammar["frame"]).replace("{place}", f"{{{surface}_place}}")
    carrier = expand(grammar, frame + "{finish}", rng)
    return carrier[0].upper() + carrier[1:]


def split_of(text: str) -> str:
    """Return the split that a quoted text or a carrier belongs to, by its hash."""
    digest = hashlib.sha256(text.encode()).digest()
    return "train" if int.from_bytes(digest[:8], "big") % TEST_SHARE else "test"


def draw_prompts(split: str, num_prompts: int, seed: int) -> list[str]:
    """Draw distinct prompts whose text and carrier both belong to a split."""
    grammar, rng = read_grammar(), random.Random(f"{seed} {split}")
    surfaces = [name.removesuffix("_text") for name in grammar if name.endswith("_text")]
    used: Counter[str] = Counter()
    prompts: dict[str, None] = {}
    while len(prompts) < num_prompts:
        surface = rng.choice(surfaces)
        target, carrier = draw_target(grammar, surface, rng), draw_carrier(grammar, surface, rng)
        key = plain(target)
        if used[key] < REPEATS[split] and len(key) in LENGTHS and split_of(key) == split:
            while split_of(carrier) != split:
                carrier = draw_carrier(grammar, surface, rng)
            used[key] += 1
            prompts[carrier.replace("{text}", target)] = None
    return list(prompts)


def write(folder: Path, seed: int = 0) -> None:
    """Write {train,test}.txt into `folder`."""
    for split, num_prompts in PROMPTS.items():
        write_lines(folder / f"{split}.txt", draw_prompts(split, num_prompts, seed))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="draws the prompts; the splits stay")
    write(FOLDER, parser.parse_args().seed)
