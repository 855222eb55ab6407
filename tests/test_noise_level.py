"""How much noise a stochastic step leaves: the script's figures, and what they do to an image."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

import pytest
import torch
from fixtures import F64, SD3_SIGMAS, close, randn

from flow_grpo import sde

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "demo" / "noise_level.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


# Ten steps of Qwen-Image and six of FLUX.1 at 512 x 512.
FLUX_SIGMAS = [1, 0.9037, 0.7897, 0.6525, 0.4842, 0.2730, 0]
QWEN_SIGMAS = [1, 0.929, 0.8515, 0.7666, 0.6733, 0.5701, 0.4555, 0.3274, 0.1833, 0.02, 0]


@pytest.mark.parametrize(
    "name, expected", [("sd3", SD3_SIGMAS), ("flux", FLUX_SIGMAS), ("qwen", QWEN_SIGMAS)]
)
def test_schedules_are_those_of_the_released_pipelines(script, name, expected):
    close(script["schedule"](name, len(expected) - 1, 512), expected, atol=6e-5)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_folders_schedule_is_the_one_that_training_uses(script, name, tmp_path):
    import tiny

    from flow_grpo.records import Size

    folder = tiny.save(name, tmp_path / name)
    for size in (64, 128):
        ours = tiny.patched(name).sigmas(8, Size(size, size))
        close(script["schedule"](str(folder), 8, size), ours, atol=0)


def test_flow_sde_leaves_24_percent_noise_where_sd3_expects_1_percent(script):
    sigmas = script["schedule"]("sd3", 10, 512)
    row = script["leftovers"]("sde", 0.7, sigmas)[-1]
    assert row["step"] == 8
    assert row["scheduled"] == pytest.approx(0.008929, abs=1e-6)
    assert row["total"] == pytest.approx(0.23995, abs=1e-5)
    assert row["fresh"] == pytest.approx(0.22536, abs=1e-5)


@pytest.mark.parametrize("kind, level", [("sde", 0.7), ("cps", 0.8), ("dance", 0.3), ("ode", 0)])
def test_the_decomposition_is_what_gaussian_data_show(script, kind, level):
    sigmas, num = script["schedule"]("sd3", 10, 512).double(), 40_000
    x0, x1, noise = 0.3 + 0.5 * randn(num, 1, seed=1), randn(num, 1, seed=2), randn(num, 1, seed=3)
    for row in script["leftovers"](kind, level, sigmas):
        sigma, sigma_next = sigmas[row["step"]], sigmas[row["step"] + 1]
        fresh = None if kind == "ode" else noise
        state = (1 - sigma) * x0 + sigma * x1
        step = sde.step(
            kind, x1 - x0, state, sigma, sigma_next, level, sigma_guard=sigmas[1], noise=fresh
        )
        left = (step.next_latents - (1 - sigma_next) * x0).std().item()
        assert left == pytest.approx(row["total"], rel=4 / (2 * num) ** 0.5)  # 4 standard errors
        law = sde.leftover_noise(kind, sigma, sigma_next, level, sigmas[1]).item()
        assert row["total"] == pytest.approx(law, abs=1e-12)


def test_cps_is_on_schedule_and_the_sdes_are_above_it(script):
    for name, num_steps in (("sd3", 10), ("flux", 6), ("qwen", 10)):
        sigmas = script["schedule"](name, num_steps, 512).double()
        for kind, level in script["LEVELS"].items():
            ratios = [row["ratio"] for row in script["leftovers"](kind, level, sigmas)]
            if kind in ("cps", "ode"):
                assert ratios == pytest.approx([1] * (num_steps - 1), abs=1e-12)
            else:
                assert min(ratios) > 1


def spread(kind, level, stochastic, data_std=0.1, num=20_000):
    """Std of what comes out of 10 steps of SD3 where the data's is data_std, by the exact model."""
    sigmas = torch.tensor(SD3_SIGMAS, dtype=F64)
    x = randn(num, 1, seed=9)
    for i in range(10):
        sigma, variance = sigmas[i], sigmas[i] ** 2 + (1 - sigmas[i]) ** 2 * data_std**2
        velocity = x * (sigma - (1 - sigma) * data_std**2) / variance
        now = kind if i in stochastic else "ode"
        noise = None if now == "ode" else randn(num, 1, seed=10 + i)
        x = sde.step(
            now, velocity, x, sigma, sigmas[i + 1], level, sigma_guard=sigmas[1], noise=noise
        ).next_latents
    return x.std().item()


def test_a_window_that_ends_early_or_cps_spares_the_picture_the_noise():
    ode = spread("ode", 0, ())
    assert spread("sde", 0.7, range(9)) > 2 * max(ode, 0.1)  # the data's own spread is 0.1
    assert spread("sde", 0.7, range(5)) < 1.2 * ode
    assert spread("cps", 0.8, range(9)) < 1.1 * ode


def test_the_script_writes_the_committed_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["noise_level.py", "--out", str(tmp_path / "noise_sd3")])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "scheduled after step 8: 0.0089\nsde 0.7: 0.2400" in capsys.readouterr().out
    assert (tmp_path / "noise_sd3.png").stat().st_size > 10_000
    written, committed = (
        list(csv.DictReader((folder / "noise_sd3.csv").open()))
        for folder in (tmp_path, ROOT / "docs" / "results")
    )
    assert len(written) == 45 and written == committed


def test_an_unknown_model_or_kernel_is_refused(monkeypatch, capsys):
    for argv in (["--model", "nothing"], ["--kernels", "euler=1"]):
        monkeypatch.setattr(sys, "argv", ["noise_level.py", *argv])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        said = str(left.value) + capsys.readouterr().err
        assert argv[1].split("=")[0] in said and ("sd3, flux" in said or "cps, dance" in said)
