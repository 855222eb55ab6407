"""Command lines that nobody meant: each is refused in words, or is a run that may start."""

from __future__ import annotations

import random

import fuzz_config
import pytest
from fuzz_config import FIXED, outcome

ABSURD = [
    "sample.guidance_scale=nan",
    "train.ema_decay=5",
    "train.beta=1e308",
    "train.lora_alpha=-5",
    "train.learning_rate=1e308",
    "train.adam_epsilon=0",
    "train.adam_beta2=1",
    "eval_reward_fn=0",
    "reward_urls={'shapes': 5}",
    "sample.num_steps=2147483648",
    "reward_fn={'shapes': inf}",
    "seed=-1",
]


@pytest.mark.parametrize("seed", range(3))
def test_random_command_lines_raise_nothing_else(seed, tmp_path):
    rng = random.Random(seed)
    seen = [outcome(fuzz_config.line(rng), tmp_path) for _ in range(60)]
    assert set(seen) == {"accepted", "refused"}


@pytest.mark.parametrize("given", ABSURD)
def test_an_absurd_value_is_refused(given, tmp_path):
    fixed = [f"--config.{key}={value}" for key, value in FIXED.items()]
    command = ["train.py", "--config=config/testbed.py:shapes_sd3_grpo", *fixed]
    assert outcome(command, tmp_path) == "accepted"
    assert outcome([*command, f"--config.{given}"], tmp_path) == "refused"
