"""Guidance by two passes, that it trains through both of them, and who says when it does."""

from dataclasses import replace

import pytest
import running
import tiny
import torch
from tiny import LENGTH, prompt_batch

from config.base import base
from flow_grpo.conditioning import collate
from flow_grpo.diffusers_patch.flux import Flux
from flow_grpo.diffusers_patch.zimage import ZImage
from flow_grpo.objectives.base import Micro
from flow_grpo.objectives.registry import find
from flow_grpo.randomness import Randomness
from flow_grpo.records import Conditioning, Guidance, Size
from flow_grpo.training import collect

SIZE, SCALE = Size(32, 32), 4.0


@pytest.mark.parametrize(
    "name, weight", [("sd3", SCALE), ("flux2_klein", SCALE), ("zimage", SCALE + 1)]
)
def test_the_guided_velocity_s_gradient_is_that_of_both_passes_in_proportion(name, weight):
    model = tiny.patched(name)
    model.transformer.requires_grad_(True)
    batch = prompt_batch(model, SIZE, ["a cat", "two dogs"], [(), ()], Guidance(SCALE))
    both = collate(model, batch, LENGTH)
    noise = torch.randn(2, *model.noise_shape(SIZE), generator=torch.Generator().manual_seed(0))
    latents, sigma = model.initial_latents(SIZE, noise), torch.tensor([0.9, 0.4])

    def gradient(conditioning):
        velocity = model.velocity(model.transformer, latents, sigma, conditioning)
        params = list(model.transformer.parameters())
        found = torch.autograd.grad((velocity * latents).mean(), params, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    conditional, unconditional = (
        gradient(Conditioning({"positive": both[name]}, model.unguided, SIZE))
        for name in ("positive", "negative")
    )
    guided = gradient(both)
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
    batch = prompt_batch(model, size, texts, images, Guidance(SCALE))
    noise = torch.randn(2, *model.noise_shape(size), generator=torch.Generator().manual_seed(0))
    inputs = model.initial_latents(size, noise), torch.tensor([0.9, 0.4])
    inputs += (collate(model, batch, pad_to),)
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
    guided = tiny.patched("qwenimage").combine(conditional, unconditional, Guidance(SCALE))
    expected = torch.tensor([[[2.4513, 4.3579], [0.8, -0.6]]])  # along (9, 16) and (4, -3)
    torch.testing.assert_close(guided.detach(), expected, rtol=0, atol=1e-4)
    guided.sum().backward()
    assert conditional.grad.abs().min() > 0 and unconditional.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("name", "guided", "alone"),
    [
        ("sd3", 1.5, 1.0),
        ("zimage", 1.0, 0.0),
        ("qwenimage", 1.5, 1.0),
        ("wan", 1.5, 1.0),
        ("flux2_klein", 1.5, 1.0),
        ("flux", None, 3.5),
        ("flux_kontext", None, 2.5),
        ("flux2_klein_distilled", None, 4.0),
    ],
)
def test_the_model_says_at_which_scale_it_makes_a_second_pass(name, guided, alone):
    model = tiny.patched(name)
    assert not model.needs_negative(Guidance(alone))
    assert not model.needs_negative(model.unguided)
    assert guided is None or model.needs_negative(Guidance(guided))


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd3", "flux2_klein", "qwenimage", "wan", "zimage"])
def test_a_conditioning_predicts_under_another_guidance_too(name):
    """As an objective asks for the unguided velocity of rows that were sampled guided."""
    model = tiny.patched(name)
    batch = prompt_batch(model, SIZE, ["a cat", "two dogs"], [(), ()], Guidance(SCALE))
    noise = torch.randn(2, *model.noise_shape(SIZE), generator=torch.Generator().manual_seed(0))
    point = model.initial_latents(SIZE, noise), torch.tensor([0.9, 0.4])
    guided = collate(model, batch, LENGTH)
    alone = collate(
        model, replace(batch, branches={"positive": batch.branches["positive"]}), LENGTH
    )

    def velocity(conditioning, guidance):
        return model.velocity(model.transformer, *point, replace(conditioning, guidance=guidance))

    unguided = velocity(alone, model.unguided)
    assert torch.equal(velocity(guided, model.unguided), unguided)
    assert not torch.equal(velocity(guided, Guidance(SCALE)), unguided)
    with pytest.raises(AssertionError, match="scale=3.0.* needs the branch 'negative'"):
        velocity(alone, Guidance(3.0))


@pytest.mark.parametrize("guidance", [Guidance(4.0, interval=(0.0, 0.9)), Guidance(4.0, rescale=1)])
@pytest.mark.parametrize("name", ["sd3", "flux", "zimage"])
def test_a_guidance_that_a_model_does_not_implement_is_refused(name, guidance):
    family = tiny.MODELS[name][0]
    family.check_guidance(Guidance(4.0))
    with pytest.raises(ValueError, match=f"scale=4.0.*{family.__name__} guides at every sigma"):
        family.check_guidance(guidance)


@pytest.mark.parametrize(
    ("name", "family", "keys", "scale", "sampled", "trained"),
    [
        ("zimage", ZImage, {"objective": "nft", "train__cfg": False}, 0.0, 2, 1),
        ("zimage", ZImage, {"objective": "nft", "train__cfg": True}, 1.0, 2, 2),
        ("flux", Flux, {"train__cfg": False}, 1.0, 1, 1),
    ],
)
def test_a_run_trains_the_guidance_of_its_model(
    files, tmp_path, name, family, keys, scale, sampled, trained
):
    """At guidance_scale 1 Z-Image guides and FLUX makes one pass, with or without train.cfg."""
    tiny.save(name, tmp_path / name)
    keys |= {"pretrained__model": tmp_path / name, "logdir": tmp_path / "logs"}
    argv = running.arguments(files, sample__guidance_scale=1.0, use_lora=True, **keys)
    run = running.prepare(argv, family)
    assert run.guidance == run.evaluator.guidance == Guidance(1.0)
    assert run.trained_guidance == Guidance(scale)
    pictures, passes = run.plan.num_groups * run.plan.group_size, run.passes()
    config = run.config
    points = config.nft.num_times if name == "zimage" else config.sample.sde_window_size
    assert passes["sampling"] == pictures * config.sample.num_steps * sampled
    assert passes["forward and backward"] == pictures * points * trained


def test_a_guided_reference_that_nothing_compares_with_is_refused(files, tmp_path):
    argv = running.arguments(files, train__reference_guidance=3.0, logdir=tmp_path)
    with pytest.raises(ValueError, match="reference_guidance=3.0: .*=grpo has no reference here"):
        running.prepare(argv)
    config = base("crd")
    config.train.reference_guidance, config.forward.norm_beta = 3.0, 0.1
    with pytest.raises(ValueError, match="norm_beta=0.1 compares .* guides the latter alone"):
        find("crd").check(config, tiny.MODELS["sd3"][0])


def test_the_reference_may_be_guided_where_neither_images_nor_policy_are(files, tmp_path):
    """CRD's KL pulls an unguided policy to the guided base."""
    keys = {"objective": "crd", "train__cfg": False, "use_lora": True, "logdir": tmp_path}
    argv = running.arguments(
        files, sample__guidance_scale=1.0, train__reference_guidance=3.0, **keys
    )
    run = running.prepare(argv)
    sampled, scores = collect.collect(run, 0)
    collect.weigh(run, sampled, scores, 0)
    rows = sampled.rollout
    points = run.objective.points(rows, Randomness(0, (0, 0)))
    micro = Micro(rows, points, run.predictor(rows), [None] * len(points))
    known = run.objective.freeze([micro], run.predict)

    def reference(scale):
        return run.predict([micro], "reference", Guidance(scale))[0]

    guided, unguided = torch.stack(known["reference"][0]), torch.stack(reference(1.0))
    assert torch.equal(guided, torch.stack(reference(3.0))) and not torch.equal(guided, unguided)
    assert torch.equal(unguided, torch.stack(run.predict([micro])[0]))  # a LoRA's start
