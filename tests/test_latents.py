"""An image becomes the state of which it is decoded, as the stock pipelines encode it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    QwenImageImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
    WanVideoToVideoPipeline,
    ZImageImg2ImgPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from flow_grpo.diffusers_patch.qwenimage_edit import QwenImageEdit, QwenImageEditPlus
from flow_grpo.diffusers_patch.sd3 import SD3
from flow_grpo.records import Size
from flow_grpo.sampling import to_uint8
from scripts.testbed import world

ROOT = Path(__file__).parent.parent
EVERY_MODEL = pytest.mark.parametrize("name", list(tiny.MODELS))


def size_of(name: str) -> Size:
    return Size(64, 96, 5) if name.startswith("wan") else Size(64, 96)


def pictures_of(size: Size, count: int) -> list[np.ndarray]:
    """Draw noise, uint8 ([F,] H, W, 3)."""
    shape = (size.num_frames,) * (size.num_frames > 1) + (size.height, size.width, 3)
    return list(np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8))


def state_of(model, size: Size, dtype=torch.float32) -> Tensor:
    noise = torch.randn(2, *model.noise_shape(size), generator=torch.Generator().manual_seed(0))
    return model.initial_latents(size, noise.to(dtype))


@EVERY_MODEL
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_what_the_vae_is_given_turns_back_into_the_state(name, dtype, bound):
    model, size = tiny.patched(name), size_of(name)
    state = state_of(model, size, dtype)
    unpacked = model.vae_latents(state, size)
    again = model.from_vae_latents(unpacked, size)
    torch.testing.assert_close(again, state, rtol=0, atol=bound)
    assert not torch.equal(unpacked.flatten(), state.flatten()), "the VAE's scale is another one"
    other = model.vae_latents(model.from_vae_latents(unpacked.flip(-1), size), size)
    torch.testing.assert_close(other, unpacked.flip(-1), rtol=0, atol=10 * bound)


@EVERY_MODEL
def test_a_picture_has_the_layout_of_the_state_that_it_is_decoded_from(name):
    model, size = tiny.patched(name), size_of(name)
    pictures = pictures_of(size, 2)
    latents = model.latents(pictures, size)
    assert latents.dtype == torch.float32 and not latents.requires_grad
    assert latents.shape == state_of(model, size).shape
    for row, picture in enumerate(pictures):
        alone = model.latents([picture], size)[0]
        assert (latents[row] - alone).abs().max() < 1e-5 * alone.abs().max()
    assert (latents[0] - latents[1]).abs().max() > 1e-2
    stacked = torch.from_numpy(np.stack(pictures))
    assert torch.equal(model.latents(stacked, size), latents)
    decoded = to_uint8(model.decode(latents, size))
    assert [image.shape for image in decoded] == [image.shape for image in pictures]


def img2img(stock: type) -> Callable:
    """Encode by the prepare_latents of a stock pipeline that starts from an image or a video."""

    def encode(model, pixels: Tensor, size: Size) -> Tensor:
        pipe = stock.from_pipe(model.pipe)
        given = {"dtype": torch.float32, "device": "cpu", "generator": None, "timestep": None}
        if stock is StableDiffusion3Img2ImgPipeline:
            given |= {"num_images_per_prompt": 1}
        else:
            channels = model.pipe.vae.config.get("latent_channels", tiny.parts.LATENT_CHANNELS)
            given |= {"num_channels_latents": channels}
            given |= {"height": size.height, "width": size.width}
        found = pipe.prepare_latents(pixels, batch_size=1, **given)
        return found[0] if isinstance(found, tuple) else found

    return encode


def as_reference(model, pixels: Tensor, size: Size) -> Tensor:
    """Encode by the prepare_latents of the editing pipeline itself, as a reference image."""
    given = 1, tiny.parts.LATENT_CHANNELS, size.height, size.width, torch.float32, "cpu", None
    if isinstance(model, QwenImageEdit):
        pixels = pixels.unsqueeze(2)
    images = [pixels] if isinstance(model, QwenImageEditPlus) else pixels
    return model.pipe.prepare_latents(images, *given)[1]


def as_klein_s_reference(model, pixels: Tensor, size: Size) -> Tensor:
    return model.pipe.prepare_image_latents([pixels], 1, None, "cpu", torch.float32)[0]


ENCODERS = {
    "sd3": img2img(StableDiffusion3Img2ImgPipeline),
    "flux": img2img(FluxImg2ImgPipeline),
    "flux_kontext": as_reference,
    "flux2_klein": as_klein_s_reference,
    "qwenimage": img2img(QwenImageImg2ImgPipeline),
    "qwenimage_edit": as_reference,
    "qwenimage_edit_2509": as_reference,
    "wan": img2img(WanVideoToVideoPipeline),
    "wan2_2": img2img(WanVideoToVideoPipeline),
    "zimage": img2img(ZImageImg2ImgPipeline),
}


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODERS)
def test_the_latents_are_the_stock_pipeline_s(name, monkeypatch):
    """Those that start from an image draw from its posterior, whose mode is asked for here."""
    mode, posterior = DiagonalGaussianDistribution.mode, DiagonalGaussianDistribution
    monkeypatch.setattr(posterior, "sample", lambda self, generator=None: mode(self))
    noised = FlowMatchEulerDiscreteScheduler
    monkeypatch.setattr(noised, "scale_noise", lambda self, latents, timestep, noise: latents)
    model, size = tiny.patched(name), size_of(name)
    (picture,) = pictures_of(size, 1)
    if name.startswith("wan"):
        pixels = model.pipe.video_processor.preprocess_video(list(picture / np.float32(255)))
    else:
        pixels = model.pipe.image_processor.preprocess(picture[None] / np.float32(255))
    expected = ENCODERS[name](model, pixels, size)
    bound = 1e-6 if "edit" in name else 0  # it divides by std; all others multiply by 1 / std
    torch.testing.assert_close(model.latents([picture], size), expected, rtol=0, atol=bound)
    assert expected.std() > 0.1


def test_a_picture_of_another_size_is_named(name="sd3"):
    model = tiny.patched(name)
    with pytest.raises(AssertionError, match=r"\(64, 96\), not of 96x64"):
        model.latents(pictures_of(Size(64, 96), 1), Size(96, 64))


def test_a_picture_is_a_video_of_one_frame():
    model, size = tiny.patched("wan"), Size(64, 96)
    (picture,) = pictures_of(size, 1)
    assert torch.equal(model.latents([picture], size), model.latents([picture[None]], size))


def test_the_testbed_s_pictures_survive_at_35_db():
    """Its autoencoder has 39.8 dB on scenes of its training's kind (scripts/testbed/README.md)."""
    path = str(ROOT / "scripts" / "testbed" / "base")
    model = SD3.from_pretrained(path, dtype=torch.float32, device="cpu", encoders=False)
    lines = (ROOT / "dataset" / "shapes" / "test_metadata.jsonl").read_text().splitlines()
    rng = random.Random(0)
    scenes = [world.draw_scene(json.loads(line), rng) for line in lines[:: len(lines) // 16]]
    pictures = np.stack([world.render(scene) for scene in scenes]).round().astype(np.uint8)
    size = Size(*pictures.shape[1:3])
    again = np.stack(to_uint8(model.decode(model.latents(list(pictures), size), size)))
    error = ((again.astype(float) - pictures) ** 2).mean((1, 2, 3))
    decibels = 10 * np.log10(255**2 / error)
    assert decibels.mean() > 38 and decibels.min() > 35, decibels
