"""Random command lines: each is refused by a ValueError, or its config passes all of preflight.

    python tests/fuzz_config.py --count 10000 --seed 0

Prints what came of them ("equal": it passed); exit status 1 if anything else was raised. Needs no
weights beyond the testbed's pipeline in scripts/testbed/base.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import fuzzing
from fuzzing import EQUAL, REFUSED

from config.base import keys_of
from flow_grpo.launch import preflight, settings

RUNS = (
    "config/testbed.py:shapes_sd3_grpo",
    "config/testbed.py:shapes_sd3",
    "config/grpo.py:general_ocr_sd3",
    "config/grpo.py:pickscore_flux_fast",
    "config/grpo.py:general_ocr_wan2_1",
    "config/grpo.py:counting_qwenimage_edit",
)
FIXED = {
    "pretrained.model": "scripts/testbed/base",
    "resolution": "32",
    "dataset": "dataset/shapes",
}
NUMBERS = "nan inf -inf -1 0 1 2 3 5 0.5 1.5 1e308 -1e308 1e-308 2147483648 -2147483649 1e400 0x10"
WORDS = "1_000 1j 1e --1 None True false yes x 'x' '' é () [] {} [1] (1, ../.. / ~ config ((1,),)"
ODD = ("", " ", '"', "\x00", "\u200b", "a\nb", "a b", "9" * 5000, "[" * 200, "1 if True else 2")
TUPLES = ("(1, 2)", "(0, 3)", "(nan,)", "('a', 'b')", "('shapes',)", "(1e308, -1e308)")
DICTS = (
    *("{1: 2}", "{'none': 1.0}", "{'shapes': 5}", "{'shapes': nan}", "{'shapes': 1e308}"),
    *("{'shapes': None}", "{'shapes': []}", "{'shapes': 'http://'}", "{'shapes': ['file:///x']}"),
)
VALUES = (*NUMBERS.split(), *WORDS.split(), *ODD, *TUPLES, *DICTS)


def line(rng: random.Random) -> list[str]:
    """Return a command line: a run, and one to three keys of any values."""
    run = rng.choice(RUNS)
    config, _ = settings.load(["train.py", f"--config={run}"], "")
    chosen = rng.sample(sorted(keys_of(config)), rng.choice((1, 1, 2, 3)))
    given = FIXED | {name: rng.choice(VALUES) for name in chosen}
    return ["train.py", f"--config={run}", *(f"--config.{k}={v}" for k, v in given.items())]


def outcome(argv: list[str], logdir: Path) -> str:
    """Return "accepted" or "refused". Raises what should not have been raised."""
    try:
        config, _ = settings.load(argv, "")
        config.logdir = str(logdir)
        preflight.check(config, world_size=2)
    except ValueError as error:
        assert str(error).strip(), "a refusal without a word"
        return "refused"
    return "accepted"


def make(folder: Path) -> fuzzing.Fuzzer:
    def fuzzer(draw: random.Random) -> str:
        command = line(draw)
        try:
            return REFUSED if outcome(command, folder / "logs") == "refused" else EQUAL
        except Exception as error:
            error.add_note(f"{command[2:]}")
            raise

    return fuzzer


if __name__ == "__main__":
    sys.exit(fuzzing.main("command lines", make, sys.argv))
