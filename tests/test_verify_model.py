"""The model check passes on every tiny pipeline, and names what is wrong with a broken one."""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from tiny import LENGTH, qwen

from config.base import base
from flow_grpo import sde
from flow_grpo.diffusers_patch.registry import FAMILIES
from flow_grpo.diffusers_patch.sd3 import SD3
from flow_grpo.evaluation.comparison import Task
from flow_grpo.launch import verify
from flow_grpo.records import Guidance, Size
from scripts import verify_model

PROMPTS = ("a photo of a red apple", 'a sign that says "Grüße 42"')
FAST = ("sd3", "flux", "flux_kontext")
MODELS = pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in tiny.MODELS]
)
EVERYTHING = {
    "sigmas equal the stock scheduler's",
    "time the transformer is told, unguided",
    "noise level 0 is stock, unguided",
    "time the transformer is told, guided",
    "noise level 0 is stock, guided",
    "reference is the base",
    "log-ratio 0 on policy, sde",
    "log-ratio 0 on policy, cps",
    "log-ratio 0 on policy, dance",
    "log-ratio 0 on policy, linear",
    "gradient reaches all that trains",
    "LoRA export gives stock images",
}


def task_of(name: str, num_steps: int = 3) -> Task:
    size = Size(32, 64, 5) if name.startswith("wan") else Size(32, 48)
    images = tiny.pictures(name)
    if name == "flux2_klein_edit":  # its stock pipeline takes no smaller ones
        images = (tiny.picture(64, 80), tiny.picture(90, 71))
    return Task(PROMPTS, images, size, num_steps, Guidance(4.0), LENGTH)


def checks(model, name: str) -> list[verify.Check]:
    with qwen.stock_reference_area(model.reference_area):  # elsewhere it is the same
        return list(verify.verify(model, task_of(name), base()))


@MODELS
def test_a_tiny_pipeline_passes_everything(name):
    model = tiny.patched(name)
    found = checks(model, name)
    assert all(check.passed for check in found), "\n".join(map(str, found))
    names = {check.name for check in found}
    guided = {n for n in EVERYTHING if n.endswith(", guided")}
    assert names == (EVERYTHING if model.guides_by_two_passes else EVERYTHING - guided)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bagel", "sd3", "flux", "flux_kontext", "flux2_klein", "zimage"])
def test_in_bf16_it_passes_within_the_stated_bound(name, tmp_path):
    family = tiny.MODELS[name][0]
    folder = tiny.save(name, tmp_path)
    model = family.from_pretrained(str(folder), dtype=torch.bfloat16, device="cpu")
    found = checks(model, name)
    assert all(check.passed for check in found), "\n".join(map(str, found))
    assert any("differs by" in check.figures for check in found)


class WrongSign(SD3):
    def velocity(self, *arguments):
        return -super().velocity(*arguments)


class WrongTime(SD3):
    def velocity(self, model, latents, sigma, *arguments):
        return super().velocity(model, latents, sigma * 0.999, *arguments)


class WrongGuidance(SD3):
    def combine(self, conditional, unconditional, guidance):
        return super().combine(conditional, unconditional, Guidance(guidance.scale + 1))


class WrongSchedule(SD3):
    def sigmas(self, num_steps, size):
        return super().sigmas(num_steps, size) ** 1.01


class Forgetful(SD3):
    """Its velocity is another each time that it is asked."""

    calls = 0

    def velocity(self, *arguments):
        self.calls += 1
        return super().velocity(*arguments) * (1 + 1e-3 * self.calls)


class Detached(SD3):
    def trains(self, parameter):
        return True  # also the last block's text query, which nobody reads


STOCK = {"noise level 0 is stock, unguided", "noise level 0 is stock, guided"}
TIME = {"time the transformer is told, unguided", "time the transformer is told, guided"}
EXPORT = {"LoRA export gives stock images"}
LOG_RATIO = {f"log-ratio 0 on policy, {kind}" for kind in sde.STOCHASTIC}
BROKEN = {
    WrongSign: STOCK | EXPORT,
    WrongTime: STOCK | TIME | EXPORT,
    WrongGuidance: {"noise level 0 is stock, guided"} | EXPORT,
    WrongSchedule: STOCK | TIME | EXPORT | {"sigmas equal the stock scheduler's"},
    Forgetful: STOCK | LOG_RATIO | EXPORT | {"reference is the base"},
    Detached: {"gradient reaches all that trains"},
}


@pytest.mark.parametrize("family", BROKEN, ids=lambda family: family.__name__)
def test_what_is_broken_fails_and_nothing_else(family):
    found = {check.name: check for check in checks(family(tiny.sd3.sd3()), "sd3")}
    assert {name for name, check in found.items() if not check.passed} == BROKEN[family]
    figures = found["gradient reaches all that trains"].figures
    assert "sampling" in figures and "s a step" in figures
    deaf = "none in transformer_blocks.1.attn.add_q_proj.lora_A" in figures
    assert deaf == (family is Detached)


def arguments(folder, *more: str) -> list[str]:
    sizes = ["--size", "32x48", "--steps", "3", "--max_sequence_length", str(LENGTH)]
    return ["verify_model.py", "--model", str(folder), *sizes, *more]


def test_the_script_prints_a_line_each_and_leaves_with_1_if_one_fails(
    tmp_path, capsys, monkeypatch
):
    folder = tiny.save("sd3", tmp_path)
    assert verify_model.main(arguments(folder, "--script", "sd3", "--device", "cpu")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all passed" and not [line for line in lines if line.startswith("FAIL")]
    assert len([line for line in lines if line.startswith("PASS  ")]) == len(EVERYTHING)
    monkeypatch.setitem(FAMILIES, "StableDiffusion3Pipeline", WrongGuidance)
    assert verify_model.main(arguments(folder)) == 1
    said = capsys.readouterr().out
    assert "\nFAIL  noise level 0 is stock, guided" in said and said.endswith("2 failed\n")


@pytest.mark.parametrize(
    "more, message",
    [
        (("--script", "flux"), "--script=flux: .* is for sd3"),
        (("--size", "big"), "--size=big: 512 or 512x768"),
        (("--size", "50"), "multiples of 16"),
        (("--steps", "1"), "--steps=1: at least 2"),
        (("--prompt", "alone"), "--prompt='alone': two prompts"),
        (("--reference", "no.png"), "--reference=no.png"),
        (("--model", "nowhere/at/all"), "there is no such folder"),
    ],
)
def test_a_wrong_option_is_named(tmp_path, more, message):
    tiny.save("sd3", tmp_path)
    with pytest.raises(SystemExit) as left:
        verify_model.main(arguments(tmp_path, *more))
    assert re.search(message, str(left.value))
