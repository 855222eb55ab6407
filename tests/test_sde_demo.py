"""scripts/demo/sde_demo.py: one prompt, kernels x noise levels, and the noise that is left."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import tiny
from PIL import Image

from scripts.demo import sde_demo


@pytest.mark.parametrize("std", [0.1, 2.0])
def test_white_noise_is_measured_and_planes_are_not(std):
    rows, columns = np.mgrid[0:64, 0:48]
    plane = 3 * rows - 0.5 * columns
    assert sde_demo.white_noise(plane[None]) == pytest.approx(0, abs=1e-9)
    noise = np.random.default_rng(0).normal(0, std, (16, 64, 48))
    assert sde_demo.white_noise(plane + noise) == pytest.approx(std, rel=0.02)


@pytest.mark.parametrize("name", ["sd3", pytest.param("wan", marks=pytest.mark.slow)])
def test_a_sheet_and_a_table_of_every_kernel_and_level(name, tmp_path):
    folder, out = tiny.save(name, tmp_path / name), tmp_path / "new" / "sheet"
    argv = ["--model", folder, "--out", out, "--prompt", "a cat", "--size", "64", "--steps", 3]
    argv += ["--max_sequence_length", 32, "--num_frames", 5 if name == "wan" else 1]
    sde_demo.main(["sde_demo.py", *map(str, argv)])
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    levels = [(k, level) for k, found in sde_demo.LEVELS.items() for level in (0.0, *found)]
    assert [(row["kernel"], float(row["noise_level"])) for row in rows] == levels
    by_cell = {key: row for key, row in zip(levels, rows, strict=True)}
    for kernel in sde_demo.LEVELS:  # the same initial noise, and at level 0 no other
        assert by_cell[kernel, 0.0]["measured"] == by_cell["sde", 0.0]["measured"]
    for (kernel, level), row in by_cell.items():
        on_schedule = kernel == "cps" or level == 0
        assert (float(row["left"]) == pytest.approx(float(row["due"]), abs=2e-4)) == on_schedule
    measured = [float(row["measured"]) for row in rows]
    assert len(set(measured)) == len(levels) - 2 and min(measured) > 0
    sheet = Image.open(out.with_suffix(".png"))
    assert sheet.width > 4 * 128 and sheet.height > 3 * 128
