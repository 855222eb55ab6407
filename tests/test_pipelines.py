"""The truth is the stock diffusers pipeline: called in fp32, on the same initial noise."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from diffusers import FluxPipeline
from fixtures import sample
from tiny import LENGTH, picture, prompt_batch, qwen

from flow_grpo.conditioning import Conditioner, Item, collate
from flow_grpo.diffusers_patch.bagel.bagel import Bagel
from flow_grpo.diffusers_patch.flux import Flux
from flow_grpo.diffusers_patch.flux_kontext import FluxKontext
from flow_grpo.diffusers_patch.qwenimage import QwenImage
from flow_grpo.diffusers_patch.qwenimage_edit import QwenImageEditPlus
from flow_grpo.diffusers_patch.sd3 import SD3
from flow_grpo.diffusers_patch.stock import timesteps
from flow_grpo.evaluation import comparison
from flow_grpo.evaluation.comparison import RANDOMNESS, Task, initial_noise
from flow_grpo.prompts import Prompt
from flow_grpo.records import Guidance, Size
from flow_grpo.sampling import Schedule

EVERY_MODEL = pytest.mark.parametrize("name", list(tiny.MODELS))
APPLE, SIGN = "a photo of a red apple", 'a sign that says "Grüße 42"'
SQUARE, WIDE, TALL = Size(64, 64), Size(48, 80), Size(96, 64)
CLIP, SMALL_CLIP, FRAME = Size(48, 64, 5), Size(64, 32, 9), Size(64, 32)
# name, guidance, size, height and width of each reference. (50, 71) is no multiple of 16.
CASES = [
    ("bagel", 4.0, SQUARE, ()),
    ("bagel", 4.0, WIDE, ()),
    ("bagel", 1.0, TALL, ()),
    ("sd3", 4.5, SQUARE, ()),
    ("sd3", 4.5, WIDE, ()),
    ("sd3", 1.0, SQUARE, ()),
    ("sd3", 1.0, WIDE, ()),
    ("sd3_without_t5", 4.5, SQUARE, ()),
    ("flux", 3.5, SQUARE, ()),
    ("flux", 3.5, WIDE, ()),
    ("flux_schnell", 3.5, TALL, ()),
    ("flux_kontext", 2.5, SQUARE, ((64, 64),)),
    ("flux_kontext", 2.5, WIDE, ((32, 64),)),
    ("flux_kontext", 2.5, TALL, ((50, 71),)),
    ("flux2_klein", 4.0, SQUARE, ()),
    ("flux2_klein", 1.0, WIDE, ()),
    ("flux2_klein_distilled", 4.0, TALL, ()),
    ("flux2_klein_edit", 4.0, WIDE, ((64, 80),)),
    ("flux2_klein_edit", 1.0, TALL, ((64, 64), (90, 71))),
    ("qwenimage", 4.0, SQUARE, ()),
    ("qwenimage", 1.0, WIDE, ()),
    ("qwenimage_edit", 4.0, WIDE, ((32, 96),)),
    ("qwenimage_edit", 1.0, TALL, ((50, 71),)),
    ("qwenimage_edit_2509", 4.0, WIDE, ((32, 96), (64, 48))),
    ("qwenimage_edit_2511", 4.0, TALL, ((50, 71), (96, 32))),
    ("wan", 4.5, CLIP, ()),
    ("wan", 1.0, FRAME, ()),
    ("wan2_2", 4.5, SMALL_CLIP, ()),
    ("zimage", 4.0, SQUARE, ()),
    ("zimage", 4.0, WIDE, ()),
    ("zimage_turbo", 0.0, TALL, ()),
]
MODES = pytest.mark.parametrize(
    ("name", "guidance", "size", "references", "num_steps"),
    [
        (*case, num_steps)
        for case in CASES
        for num_steps in ((6, 10, 28) if case[0].startswith("sd3") else (6, 28))
    ],
)


@pytest.fixture(scope="module")
def models():
    return {name: tiny.patched(name) for name in tiny.MODELS}


def pictures(sizes, seed=0) -> tuple:
    return tuple(picture(*size, seed + 10 * n) for n, size in enumerate(sizes))


def stock_noise(model, size, num_rows):
    """Give the rows' initial noise as the stock pipeline's `latents`: packed by its own code."""
    noise = initial_noise(model, size, list(range(num_rows)))
    return (
        FluxPipeline._pack_latents(noise, *noise.shape)
        if isinstance(model, (Flux, QwenImage))
        else noise
    )


def stock_embeds(model, cond, prefix=""):
    """Give rows of collate() as arguments of the stock pipeline."""
    embeds = model.prompts(cond) if "lengths" in cond else cond["embeds"]
    arguments = {f"{prefix}prompt_embeds": embeds}
    if "mask" in cond:
        arguments[f"{prefix}prompt_embeds_mask"] = cond["mask"]
    if "pooled" in cond:
        arguments[f"{prefix}pooled_prompt_embeds"] = cond["pooled"]
    return arguments


def call_stock(model, size, num_steps, guidance, latents, images=(), **given):
    """Return the stock pipeline's final latents and uint8 images or videos."""
    task = Task((), images, size, num_steps, Guidance(guidance), LENGTH)
    noise = initial_noise(model, size, list(range(len(latents))))
    with qwen.stock_reference_area(model.reference_area):  # elsewhere it is the same
        states, pictures = comparison.call_stock(model, task, noise, latents=latents, **given)
    return states[-1], pictures


def schedule_of(model, size, num_steps, pad_to=LENGTH) -> Schedule:
    return Schedule(model.sigmas(num_steps, size), pad_to=pad_to)


def assert_same(rollout, latents, images):
    assert torch.equal(rollout.final, latents)
    assert len(rollout.images) == len(images)
    for ours, theirs in zip(rollout.images, images, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert theirs.std() > 5, "the images must not be flat"


@MODES
def test_without_noise_a_prompt_gives_the_stock_picture(
    models, name, guidance, size, references, num_steps
):
    model = models[name]
    images = pictures(references)
    noise = stock_noise(model, size, 1)
    with timesteps(model.transformer) as stock_times:
        expected = call_stock(model, size, num_steps, guidance, noise, images, prompt=SIGN)
    schedule = schedule_of(model, size, num_steps, pad_to=0)  # a lone prompt: no padding
    assert torch.equal(schedule.sigmas, model.pipe.scheduler.sigmas)
    batch = prompt_batch(model, size, [SIGN], [images], Guidance(guidance))
    with timesteps(model.transformer) as times:
        assert_same(sample(model, model.transformer, batch, schedule, RANDOMNESS), *expected)
    assert times == stock_times


@MODES
def test_without_noise_two_prompts_give_the_stock_pictures(
    models, name, guidance, size, references, num_steps
):
    model = models[name]
    if isinstance(model, (Bagel, QwenImageEditPlus)):
        pytest.skip("its stock pipeline takes one prompt a call")
    seeds = (1, 2) if isinstance(model, FluxKontext) else (1, 1)  # other stock calls have one set
    images = [pictures(references, seed) for seed in seeds]
    batch = prompt_batch(model, size, [APPLE, SIGN], images, Guidance(guidance))
    branches = {name: model.collate(conds, LENGTH) for name, conds in batch.branches.items()}
    arguments = stock_embeds(model, branches["positive"])
    if "negative" in branches:
        arguments |= stock_embeds(model, branches["negative"], "negative_")
    if isinstance(model, FluxKontext):  # four channels: stock takes latents for an encoded image
        arguments["image"] = branches["positive"]["reference_0"]
    shared = () if isinstance(model, FluxKontext) else images[0]
    noise = stock_noise(model, size, 2)
    expected = call_stock(model, size, num_steps, guidance, noise, shared, **arguments)
    schedule = schedule_of(model, size, num_steps)
    rollout = sample(model, model.transformer, batch, schedule, RANDOMNESS)
    assert_same(rollout, *expected)
    assert not np.array_equal(*rollout.images)


@EVERY_MODEL
def test_a_row_does_not_depend_on_its_neighbour(models, name):
    model = models[name]
    images = [tiny.pictures(name, seed) for seed in (1, 2)]
    batch = prompt_batch(model, SQUARE, [APPLE, SIGN], images, model.unguided)
    conditioning = collate(model, batch, LENGTH)
    noise = RANDOMNESS.normal("init", [(0, 0), (1, 0)], model.noise_shape(SQUARE))
    latents, sigma = model.initial_latents(SQUARE, noise), torch.tensor([0.9, 0.4])

    @torch.no_grad()
    def velocity(rows):
        chosen = {key: value[rows] for key, value in conditioning["positive"].items()}
        inputs = latents[rows], sigma[rows], replace(conditioning, branches={"positive": chosen})
        return model.velocity(model.transformer, *inputs)

    both = velocity(slice(0, 2))
    alone = torch.cat([velocity(slice(0, 1)), velocity(slice(1, 2))])
    assert (both - alone).abs().max() < 1e-3 * both.abs().max()
    assert (both[0] - both[1]).abs().max() > 0.1 * both.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwenimage", "qwenimage_edit_2509", "zimage"])
def test_padding_changes_a_velocity_by_rounding_only(models, name):
    model = models[name]
    batch = prompt_batch(model, WIDE, [SIGN], [tiny.pictures(name)], model.unguided)
    noise = RANDOMNESS.normal("init", [(0, 0)], model.noise_shape(WIDE))
    inputs = model.transformer, model.initial_latents(WIDE, noise), torch.tensor([0.7])
    alone, narrow, wide = (
        model.velocity(*inputs, collate(model, batch, pad_to)) for pad_to in (0, LENGTH, 4 * LENGTH)
    )
    for padded in (narrow, wide):
        assert (padded - alone).abs().max() < 1e-5 * alone.abs().max()


def test_each_row_of_an_edit_is_padded_beyond_its_own_pictures(models):
    """Images' tokens count beside the text's, so that a large one does not cut the prompt."""
    model = models["qwenimage_edit_2509"]
    seen = []
    hook = model.pipe.text_encoder.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs["input_ids"]), with_kwargs=True
    )
    for text, images in ((APPLE, (picture(32, 96),)), (SIGN, tiny.pictures("qwenimage_edit_2509"))):
        cond = model.encode(text, images, LENGTH)
        num_tokens = (seen[-1] == model.pipe.processor.image_token_id).sum().item()
        assert num_tokens >= 12 * len(images)
        assert model.collate([cond], LENGTH)["mask"].shape == (1, LENGTH + num_tokens)
        cut = model.encode(text, images, 8)
        assert torch.equal(cut.tensors["embeds"], cond.tensors["embeds"][: 8 + num_tokens])
    hook.remove()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwenimage_edit", "qwenimage_edit_2509"])
def test_at_the_stock_area_an_edit_gives_the_untouched_stock_picture(models, name, monkeypatch):
    model = models[name]
    monkeypatch.setattr(model, "reference_area", 1024 * 1024)
    monkeypatch.setattr(qwen, "stock_reference_area", lambda area: nullcontext())
    test_without_noise_a_prompt_gives_the_stock_picture(
        {name: model}, name, 4.0, WIDE, tiny.EDITS[name], 2
    )


def test_a_reference_that_would_vanish_is_refused(models):
    with pytest.raises(ValueError, match="config.reference_area=4096: .* 900 x 10 pixels"):
        models["qwenimage_edit"].resized(picture(10, 900), 64 * 64)


@EVERY_MODEL
def test_each_distinct_prompt_is_encoded_once(models, name):
    model = models[name]
    images = tiny.pictures(name)
    conditioner = Conditioner(model, LENGTH)
    passes = []
    bagel = name == "bagel"
    reader = (
        model.transformer.language_model.model.embed_tokens if bagel else model.pipe.text_encoder
    )
    hook = reader.register_forward_hook(lambda *_: passes.append(1))
    conds = [conditioner.cond(Item(text, ("a.png",)), images) for text in [APPLE, SIGN] * 4]
    hook.remove()
    assert len(passes) == conditioner.num_encoded == 2
    assert conds[0] is conds[2] and conds[1] is conds[7] and conds[0] is not conds[1]


@pytest.mark.parametrize("sizes", [((32, 48), (48, 48)), ((32, 64), (64, 32))])
def test_references_of_two_sizes_can_not_share_a_call(models, sizes):
    """The second pair has equally many tokens, at different positions."""
    model = models["flux_kontext"]
    images = [(picture(*size),) for size in sizes]
    batch = prompt_batch(model, SQUARE, [APPLE, SIGN], images, Guidance(2.5))
    schedule = schedule_of(model, SQUARE, 6)
    with pytest.raises(ValueError, match="sample.train_batch_size"):
        sample(model, model.transformer, batch, schedule, RANDOMNESS)


@pytest.mark.parametrize(
    ("name", "num_images", "needed"),
    [
        ("flux_kontext", 0, "exactly 1"),
        ("flux_kontext", 2, "exactly 1"),
        ("qwenimage_edit", 2, "exactly 1"),
        ("qwenimage_edit_2509", 0, "at least 1"),
    ],
)
def test_an_editing_model_wants_its_number_of_references(name, num_images, needed):
    prompt = Prompt(APPLE, images=("a.png",) * num_images)
    with pytest.raises(ValueError, match=f"{APPLE}.* has {num_images} reference.* takes {needed}"):
        tiny.MODELS[name][0].check_prompts([prompt])


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (1024, 1024, (1024, 1024)),
        (512, 768, (512, 768)),
        (527, 513, (512, 512)),
        (2048, 2048, (1024, 1024)),
        (2000, 1000, (1440, 720)),  # 2000 * sqrt(2^20 / 2e6) = 1448.2, 724.1
        (10, 300, (16, 288)),
    ],
)
def test_a_reference_keeps_its_size_up_to_one_megapixel(models, height, width, expected):
    size = models["flux_kontext"].reference_size(height, width)
    assert size == expected
    assert size[0] * size[1] <= 1024 * 1024


@EVERY_MODEL
def test_each_lora_target_names_a_layer(models, name):
    model = models[name]
    layers = [
        path
        for path, module in model.transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    for target in model.lora_target_modules:
        assert any(path.endswith("." + target) for path in layers), target


@EVERY_MODEL
def test_only_what_never_reaches_the_output_is_left_out_of_the_backward(name):
    """DistributedDataParallel stops where a parameter that trains gets no gradient."""
    model = tiny.patched(name)
    batch = prompt_batch(model, SQUARE, [SIGN], [tiny.pictures(name)], model.unguided)
    noise = RANDOMNESS.normal("init", [(0, 0)], model.noise_shape(SQUARE))
    latents, sigma = model.initial_latents(SQUARE, noise), torch.tensor([0.7])
    named = model.transformer.requires_grad_(True).named_parameters()
    params = {key: param for key, param in named if model.trained_part in key}
    velocity = model.velocity(model.transformer, latents, sigma, collate(model, batch, LENGTH))
    found = torch.autograd.grad(velocity.square().mean(), params.values(), allow_unused=True)
    grads = dict(zip(params, found, strict=True))
    frozen = {key for key in params if not model.trains(key)}
    assert {key for key, grad in grads.items() if grad is None} <= frozen
    assert frozen <= {key for key, grad in grads.items() if grad is None or not grad.any()}


def test_a_saved_pipeline_loads_without_its_absent_encoder(models, tmp_path):
    folder = tiny.save("sd3_without_t5", tmp_path)
    loaded = SD3.from_pretrained(str(folder), dtype=torch.float32, device="cpu")
    assert loaded.pipe.text_encoder_3 is None
    schedule = schedule_of(loaded, SQUARE, 4)
    rollouts = [
        sample(
            model,
            model.transformer,
            prompt_batch(model, SQUARE, [SIGN], [()], Guidance(4.5)),
            schedule,
            RANDOMNESS,
        )
        for model in (loaded, models["sd3_without_t5"])
    ]
    assert_same(rollouts[0], rollouts[1].final, rollouts[1].images)


def test_a_folder_of_another_model_is_refused(tmp_path):
    tiny.save("flux", tmp_path)
    with pytest.raises(ValueError, match=r"config.pretrained.model=.* is a FluxPipeline") as error:
        SD3.from_pretrained(str(tmp_path), dtype=torch.float32, device="cpu")
    assert "StableDiffusion3Pipeline" in str(error.value)


def test_a_missing_folder_is_refused(tmp_path):
    missing = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="config.pretrained.model=.*nowhere"):
        SD3.from_pretrained(missing, dtype=torch.float32, device="cpu")


def test_flux_refuses_fp16(tmp_path):
    with pytest.raises(ValueError, match="config.mixed_precision=fp16.*bf16"):
        Flux.from_pretrained(str(tmp_path), dtype=torch.float16, device="cpu")
