"""The truth is the stock diffusers pipeline: called in fp32, on the same initial noise."""

from contextlib import contextmanager

import numpy as np
import pytest
import tiny
import torch
from diffusers import FluxPipeline
from PIL import Image
from tiny import LENGTH, picture, prompt_batch

from flow_grpo.conditioning import Conditioner
from flow_grpo.diffusers_patch.flux import Flux
from flow_grpo.diffusers_patch.flux_kontext import MAX_REFERENCE_AREA, FluxKontext
from flow_grpo.diffusers_patch.sd3 import SD3
from flow_grpo.rollout import Size
from flow_grpo.sampling import Draw, Sampler, sample
from flow_grpo.training.prompts import Prompt

EVERY_MODEL = pytest.mark.parametrize("name", list(tiny.MODELS))
APPLE, SIGN = "a photo of a red apple", 'a sign that says "Grüße 42"'
SQUARE, WIDE, TALL = Size(64, 64), Size(48, 80), Size(96, 64)
DRAW = Draw(seed=7, coordinates=(3,))
# name, guidance, size, reference's height and width. The last one is no multiple of 16.
CASES = [
    ("sd3", 4.5, SQUARE, None),
    ("sd3", 4.5, WIDE, None),
    ("sd3", 1.0, SQUARE, None),
    ("sd3", 1.0, WIDE, None),
    ("sd3_without_t5", 4.5, SQUARE, None),
    ("flux", 3.5, SQUARE, None),
    ("flux", 3.5, WIDE, None),
    ("flux_schnell", 3.5, TALL, None),
    ("flux_kontext", 2.5, SQUARE, (64, 64)),
    ("flux_kontext", 2.5, WIDE, (32, 64)),
    ("flux_kontext", 2.5, TALL, (50, 71)),
]
MODES = pytest.mark.parametrize(
    ("name", "guidance", "size", "reference", "num_steps"),
    [
        (*case, num_steps)
        for case in CASES
        for num_steps in ((10, 28) if case[0].startswith("sd3") else (6, 28))
    ],
)


@pytest.fixture(scope="module")
def models():
    return {name: tiny.patched(name) for name in tiny.MODELS}


def stock_noise(model, size, num_rows):
    """Give the rows' initial noise as the stock pipeline's `latents`: packed by its own code."""
    owners = [(row, 0) for row in range(num_rows)]
    noise = DRAW.normal("init", owners, model.noise_shape(size))
    return FluxPipeline._pack_latents(noise, *noise.shape) if isinstance(model, Flux) else noise


def call_stock(model, size, num_steps, guidance, **arguments):
    """Return the stock pipeline's final latents and uint8 pictures."""
    seen = {}
    if isinstance(model, FluxKontext):
        arguments |= {"max_area": size.height * size.width, "_auto_resize": False}
    output = model.pipe(
        height=size.height,
        width=size.width,
        num_inference_steps=num_steps,
        guidance_scale=guidance,
        max_sequence_length=LENGTH,
        callback_on_step_end=lambda pipe, step, time, tensors: seen.update(tensors) or {},
        **arguments,
    )
    return seen["latents"], [np.asarray(image) for image in output.images]


@contextmanager
def timesteps(model):
    """List what the transformer is told of the time: fp32 outputs can hide a wrong last bit."""
    seen = []
    hook = model.transformer.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs["timestep"].tolist()), with_kwargs=True
    )
    yield seen
    hook.remove()


def sampler_of(model, size, num_steps, guidance, **settings) -> Sampler:
    return Sampler(model.sigmas(num_steps, size), guidance, **settings)


def assert_same(rollout, latents, images):
    assert torch.equal(rollout.final, latents)
    assert len(rollout.images) == len(images)
    for ours, theirs in zip(rollout.images, images, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert theirs.std() > 5, "the pictures must not be flat"


@MODES
def test_without_noise_a_prompt_gives_the_stock_picture(
    models, name, guidance, size, reference, num_steps
):
    model = models[name]
    images = (picture(*reference),) if reference else ()
    arguments = {"image": Image.fromarray(images[0])} if reference else {}
    arguments |= {"prompt": SIGN, "latents": stock_noise(model, size, 1)}
    with timesteps(model) as stock_times:
        expected = call_stock(model, size, num_steps, guidance, **arguments)
    sampler = sampler_of(model, size, num_steps, guidance)
    assert torch.equal(sampler.sigmas, model.pipe.scheduler.sigmas)
    batch = prompt_batch(model, size, [SIGN], [images], guidance)
    with timesteps(model) as times:
        assert_same(sample(model, model.transformer, batch, sampler, DRAW), *expected)
    assert times == stock_times


@MODES
def test_without_noise_two_prompts_give_the_stock_pictures(
    models, name, guidance, size, reference, num_steps
):
    model = models[name]
    images = [(picture(*reference, seed),) if reference else () for seed in (1, 2)]
    batch = prompt_batch(model, size, [APPLE, SIGN], images, guidance)
    cond = model.collate(batch.conds, LENGTH)
    arguments = {"prompt_embeds": cond["embeds"], "pooled_prompt_embeds": cond["pooled"]}
    if batch.negatives:
        negative = model.collate(batch.negatives, LENGTH)
        arguments["negative_prompt_embeds"] = negative["embeds"]
        arguments["negative_pooled_prompt_embeds"] = negative["pooled"]
    if reference:  # four channels: the stock pipeline takes latents for an encoded picture
        arguments["image"] = cond["reference_latents"]
    noise = stock_noise(model, size, 2)
    expected = call_stock(model, size, num_steps, guidance, latents=noise, **arguments)
    sampler = sampler_of(model, size, num_steps, guidance)
    rollout = sample(model, model.transformer, batch, sampler, DRAW)
    assert_same(rollout, *expected)
    assert not np.array_equal(*rollout.images)


@EVERY_MODEL
def test_a_row_does_not_depend_on_its_neighbour(models, name):
    model = models[name]
    images = [(picture(32, 48, seed),) if name in tiny.EDITS else () for seed in (1, 2)]
    batch = prompt_batch(model, SQUARE, [APPLE, SIGN], images, 1.0)
    cond = model.collate(batch.conds, LENGTH)
    noise = DRAW.normal("init", [(0, 0), (1, 0)], model.noise_shape(SQUARE))
    latents, sigma = model.initial_latents(SQUARE, noise), torch.tensor([0.9, 0.4])

    @torch.no_grad()
    def velocity(rows):
        inputs = latents[rows], sigma[rows], {key: value[rows] for key, value in cond.items()}
        return model.velocity(model.transformer, *inputs, None, 1.0, SQUARE)

    both = velocity(slice(0, 2))
    alone = torch.cat([velocity(slice(0, 1)), velocity(slice(1, 2))])
    assert (both - alone).abs().max() < 1e-3 * both.abs().max()
    assert (both[0] - both[1]).abs().max() > 0.1 * both.abs().max()


@EVERY_MODEL
def test_each_distinct_prompt_is_encoded_once(models, name):
    model = models[name]
    images = (picture(32, 48),) if name in tiny.EDITS else ()
    conditioner = Conditioner(model, LENGTH)
    passes = []
    hook = model.pipe.text_encoder.register_forward_hook(lambda *_: passes.append(1))
    conds = [conditioner.cond(text, ("a.png",), images) for text in [APPLE, SIGN] * 4]
    hook.remove()
    assert len(passes) == conditioner.num_encoded == 2
    assert conds[0] is conds[2] and conds[1] is conds[7] and conds[0] is not conds[1]


@pytest.mark.parametrize("sizes", [((32, 48), (48, 48)), ((32, 64), (64, 32))])
def test_references_of_two_sizes_can_not_share_a_call(models, sizes):
    """The second pair has equally many tokens, at different positions."""
    model = models["flux_kontext"]
    images = [(picture(*size),) for size in sizes]
    batch = prompt_batch(model, SQUARE, [APPLE, SIGN], images, 2.5)
    sampler = sampler_of(model, SQUARE, 6, 2.5)
    with pytest.raises(ValueError, match="sample.train_batch_size"):
        sample(model, model.transformer, batch, sampler, DRAW)


@pytest.mark.parametrize("num_images", [0, 2])
def test_kontext_wants_one_reference_a_row(models, num_images):
    prompt = Prompt(APPLE, images=("a.png",) * num_images)
    with pytest.raises(ValueError, match=f"{APPLE}.* has {num_images} reference"):
        models["flux_kontext"].check_prompts([prompt])


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
    assert size[0] * size[1] <= MAX_REFERENCE_AREA


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


def test_a_saved_pipeline_loads_without_its_absent_encoder(models, tmp_path):
    folder = tiny.save("sd3_without_t5", tmp_path)
    loaded = SD3.from_pretrained(str(folder), dtype=torch.float32, device="cpu")
    assert loaded.pipe.text_encoder_3 is None
    sampler = sampler_of(loaded, SQUARE, 4, 4.5)
    rollouts = [
        sample(
            model, model.transformer, prompt_batch(model, SQUARE, [SIGN], [()], 4.5), sampler, DRAW
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
