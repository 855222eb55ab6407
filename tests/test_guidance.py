"""Guidance by two passes, and that it trains through both of them."""

import pytest
import tiny
import torch
from tiny import LENGTH, prompt_batch

from flow_grpo.records import Size

SIZE, SCALE = Size(32, 32), 4.0


@pytest.mark.parametrize(
    "name, weight", [("sd3", SCALE), ("flux2_klein", SCALE), ("zimage", SCALE + 1)]
)
def test_the_guided_velocity_s_gradient_is_that_of_both_passes_in_proportion(name, weight):
    model = tiny.patched(name)
    model.transformer.requires_grad_(True)
    batch = prompt_batch(model, SIZE, ["a cat", "two dogs"], [(), ()], SCALE)
    cond, negative = (model.collate(conds, LENGTH) for conds in (batch.conds, batch.negatives))
    noise = torch.randn(2, *model.noise_shape(SIZE), generator=torch.Generator().manual_seed(0))
    latents, sigma = model.initial_latents(SIZE, noise), torch.tensor([0.9, 0.4])

    def gradient(cond, negative, scale):
        inputs = latents, sigma, cond, negative, scale, SIZE
        velocity = model.velocity(model.transformer, *inputs)
        params = list(model.transformer.parameters())
        found = torch.autograd.grad((velocity * latents).mean(), params, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    alone = model.unguided_scale
    conditional, unconditional = (gradient(c, None, alone) for c in (cond, negative))
    guided = gradient(cond, negative, SCALE)
    expected = weight * conditional + (1 - weight) * unconditional
    torch.testing.assert_close(guided, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert (unconditional - conditional).abs().max() > 0.1 * conditional.abs().max()


BATCHED = ("qwenimage", "qwenimage_edit", "qwenimage_edit_2509", "wan", "wan2_2")
BATCHED += ("flux2_klein", "flux2_klein_edit")


@torch.no_grad()
@pytest.mark.parametrize("pad_to", [LENGTH, 0], ids=["padded", "to the call's longest"])
@pytest.mark.parametrize("name", BATCHED)
def test_one_pass_of_twice_the_rows_guides_as_two_passes_do_but_for_rounding(name, pad_to):
    model = tiny.patched(name)
    size = Size(64, 64, 5 if name.startswith("wan") else 1)
    images = [tiny.pictures(name, seed) for seed in (1, 2)]
    texts = ["a cat", 'a sign that says "two dogs"']
    batch = prompt_batch(model, size, texts, images, SCALE)
    conds = (model.collate(rows, pad_to) for rows in (batch.conds, batch.negatives))
    noise = torch.randn(2, *model.noise_shape(size), generator=torch.Generator().manual_seed(0))
    inputs = model.initial_latents(size, noise), torch.tensor([0.9, 0.4]), *conds, SCALE, size
    calls = []
    hook = model.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    apart = model.velocity(model.transformer, *inputs)
    model.batches_guidance = True
    together = model.velocity(model.transformer, *inputs)
    hook.remove()
    assert len(calls) == 3
    assert (together - apart).abs().max() < 1e-5 * apart.abs().max()


def test_qwen_image_s_guidance_keeps_the_norm_of_each_conditional_token():
    conditional = torch.tensor([[[3.0, 4], [1, 0]]], requires_grad=True)
    unconditional = torch.tensor([[[1.0, 0], [0, 1]]], requires_grad=True)
    guided = tiny.patched("qwenimage").combine(conditional, unconditional, SCALE)
    expected = torch.tensor([[[2.4513, 4.3579], [0.8, -0.6]]])  # along (9, 16) and (4, -3)
    torch.testing.assert_close(guided.detach(), expected, rtol=0, atol=1e-4)
    guided.sum().backward()
    assert conditional.grad.abs().min() > 0 and unconditional.grad.abs().min() > 0
