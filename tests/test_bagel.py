"""BAGEL against an independent fp64 computation, its folder, and what it can't do."""

from __future__ import annotations

from dataclasses import replace

import bagel_reference
import pytest
import tiny
import torch
from test_verify_model import task_of
from tiny import LENGTH, prompt_batch

from config.base import base
from flow_grpo.conditioning import collate
from flow_grpo.diffusers_patch.bagel import pipeline as stock
from flow_grpo.diffusers_patch.bagel.bagel import Bagel
from flow_grpo.launch import build, verify
from flow_grpo.records import Guidance, Size

SQUARE, WIDE, TALL = Size(32, 32), Size(48, 128), Size(96, 32)
SHORT, LONG = "two dogs", 'a sign that says "a blue cube"'
GUIDED = Guidance(4.0)


@pytest.fixture(scope="module")
def model() -> Bagel:
    return tiny.patched("bagel")


def relative(found, truth) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


def ids_of(model, prompt: str) -> list[int]:
    tokenizer = model.pipe.tokenizer
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    return [start, *tokenizer(prompt).input_ids, end]


def truth_of(model, ids, tokens, time, size):
    config = model.transformer.config
    return bagel_reference.velocity(
        model.transformer.state_dict(),
        ids,
        tokens,
        time,
        (size.height // 16, size.width // 16),
        (config.start_of_image, config.end_of_image),
        (config.num_attention_heads, config.num_key_value_heads),
    )


def noise_of(model, size, rows=2, seed=0):
    return torch.randn(
        rows, *model.noise_shape(size), generator=torch.Generator().manual_seed(seed)
    )


@torch.no_grad()
def velocity_of(model, size, guidance, noise, times, prompts=(SHORT, LONG)):
    batch = prompt_batch(model, size, prompts, [()] * len(prompts), guidance)
    given = collate(model, batch, LENGTH)
    return model.velocity(model.transformer, noise, torch.tensor(times), given)


@pytest.mark.parametrize("batched", [False, True], ids=["two passes", "one pass"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("size", [SQUARE, WIDE, TALL])
@pytest.mark.parametrize("guidance", [Guidance(1.0), GUIDED, Guidance(4.0, rescale=1.0)])
def test_two_prompts_in_a_call_have_the_velocities_of_the_formulas(
    model, size, seed, guidance, batched, monkeypatch
):
    monkeypatch.setattr(model, "batches_guidance", batched)
    noise, times = noise_of(model, size, seed=seed), [0.9, 0.35]
    found = velocity_of(model, size, guidance, noise, times)
    for row, prompt in enumerate((SHORT, LONG)):
        passes = [
            truth_of(model, ids, noise[row], times[row], size)
            for ids in (ids_of(model, prompt), [])
        ]
        truth = passes[0]
        if guidance.scale > 1:
            truth = bagel_reference.guided(*passes, guidance.scale, guidance.rescale)
            assert relative(truth, passes[0]) > 0.3
        assert relative(found[row], truth) < 1e-5


def test_each_picture_is_rescaled_by_its_own_norms(model):
    """So that a picture's velocity does not depend on its neighbours'."""
    generator = torch.Generator().manual_seed(0)
    c, u = (torch.randn(2, 5, 16, generator=generator) for _ in range(2))
    c[1] *= 10
    found = model.combine(c, u, GUIDED)
    for row in range(2):
        truth = bagel_reference.guided(c[row].double(), u[row].double(), 4.0)
        assert relative(found[row], truth) < 1e-6


def test_guidance_acts_above_an_interval_s_start_and_up_to_its_end(model):
    noise = noise_of(model, SQUARE, rows=4)
    within = replace(GUIDED, interval=(0.4, 0.8))
    prompts, times = (SHORT, LONG, SHORT, LONG), [0.9, 0.8, 0.5, 0.4]
    found, guided, alone = (
        velocity_of(model, SQUARE, guidance, noise, times, prompts)
        for guidance in (within, GUIDED, model.unguided)
    )
    for row, acts in enumerate((False, True, True, False)):
        assert torch.equal(found[row], (guided if acts else alone)[row])


def test_time_is_told_as_it_is_and_moves_along_a_shifted_line_of_n_points(model):
    """bagel's own count of 15 points is 14 steps."""
    expected = [1, 0.975, 0.9474, 0.9167, 0.8824, 0.8438, 0.8, 0.75]
    expected += [0.6923, 0.625, 0.5455, 0.45, 0.3333, 0.1875, 0]
    sigmas = model.sigmas(14, SQUARE)
    torch.testing.assert_close(sigmas, torch.tensor(expected), rtol=0, atol=5e-5)
    for num_points in (15, 25, 50):
        line = torch.linspace(1, 0, num_points)
        assert torch.equal(model.sigmas(num_points - 1, SQUARE), 3 * line / (1 + 2 * line))


def test_a_patch_counts_rows_then_columns_then_channels():
    latents = torch.arange(2 * 4 * 6).view(1, 2, 4, 6).float()  # two channels of 4 x 6
    tokens = stock.patched(latents)
    assert tokens.shape == (1, 6, 8)
    second = latents[0, :, 0:2, 2:4]  # of the first row
    truth = [
        second[channel, row, column] for row in (0, 1) for column in (0, 1) for channel in (0, 1)
    ]
    assert tokens[0, 1].tolist() == [value.item() for value in truth]
    assert torch.equal(stock.unpatched(tokens, (2, 3)), latents)


def test_a_prompt_is_cut_and_its_keys_and_values_do_not_move_as_the_model_trains():
    model = tiny.patched("bagel")
    before = model.encode(LONG, (), LENGTH).tensors["embeds"]
    assert len(before) == len(ids_of(model, LONG))
    cut = model.encode(LONG, (), 6).tensors["embeds"]
    assert len(cut) == 6 and (cut[:5] - before[:5]).abs().max() < 1e-5
    assert (cut[5] - before[5]).abs().max() > 0.1  # its last token is the mark
    model.add_lora(4, 8, list(model.lora_target_modules))
    with torch.no_grad():
        for name, param in model.transformer.named_parameters():
            if "lora_B" in name or model.trains(name):
                param.normal_()
    assert torch.equal(model.encode(LONG, (), LENGTH).tensors["embeds"], before)
    assert model.negative((), LENGTH).tensors["embeds"].shape == (0, before.shape[1])


def test_rows_of_one_prompt_need_no_mask(model):
    batch = prompt_batch(model, SQUARE, [LONG], [()], GUIDED, owners=[(0, 0), (0, 1)])
    given = collate(model, batch, LENGTH)
    assert "mask" not in given["positive"] and "mask" not in given["negative"]
    assert given["positive"]["embeds"].shape[1] == len(ids_of(model, LONG))
    joined = model.join(given["positive"], given["negative"])
    assert joined["mask"].sum(1).tolist() == [len(ids_of(model, LONG))] * 2 + [0, 0]


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_a_rollout_scored_again_has_log_ratio_zero(kind, scale):
    fresh = tiny.patched("bagel")
    build.add_trained_weights(fresh, base())
    verify.randomise_lora(fresh)
    task = replace(task_of("bagel"), guidance=Guidance(scale))
    found = verify.check_log_ratio(fresh, task, kind)
    assert found.passed and "(at most 0)" in found.figures, found
