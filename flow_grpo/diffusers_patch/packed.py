"""What models share whose token is 2 x 2 latents: packed states, a shift that grows with them."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.records import Cond, Size


class Packed(PatchedPipeline):
    """A state is (B, H/16 * W/16, 4 C), row after row of the image."""

    def initial_latents(self, size: Size, noise: Tensor) -> Tensor:
        return pack(noise)

    def grid(self, size: Size) -> tuple[int, int]:
        """Return the image's height and width in tokens."""
        return size.height // (self.vae_scale * 2), size.width // (self.vae_scale * 2)

    def scheduler_arguments(self, num_steps: int, size: Size) -> dict:
        height, width = self.grid(size)
        mu = self.dynamic_shift(height * width, max_shift=1.15)
        return {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps), "mu": mu}

    def vae_latents(self, latents: Tensor, size: Size) -> Tensor:
        return super().vae_latents(unpack(latents, *self.grid(size)), size)

    def from_vae_latents(self, latents: Tensor, size: Size) -> Tensor:
        return pack(super().from_vae_latents(latents, size))

    def with_references(self, cond: Cond, images: tuple) -> Cond:
        """Encode reference images into a conditioning's "reference_0", "reference_1" ..."""
        for number, image in enumerate(images):
            # Not packed: its shape tells the positions, and tells apart 32x64 from 64x32.
            cond.tensors[f"reference_{number}"] = self.reference_latents(image).cpu()
        return cond

    def reference_latents(self, image: np.ndarray) -> Tensor:
        """Encode an image, uint8 (H, W, 3), to latents (C, h, w), fp32."""
        raise NotImplementedError


class Edits(Packed):
    """Comes before the class of the model that draws from text alone, as in (Edits, Flux)."""

    @torch.no_grad()
    def encode(self, prompt: str, images: tuple, max_length: int) -> Cond:
        return self.with_references(super().encode(prompt, images, max_length), images)


def references_of(positive: dict[str, Tensor]) -> list[Tensor]:
    """Return the latents (B, C, h, w) of a call's reference images, in their order."""
    return [value for name, value in positive.items() if name.startswith("reference_")]


def pack(latents: Tensor) -> Tensor:
    """Turn latents (B, C, h, w) into tokens (B, h/2 * w/2, 4 C), row after row."""
    return pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2).contiguous()


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Undo pack. height, width: in tokens."""
    grid = tokens.transpose(1, 2).unflatten(2, (height, width))
    return pixel_shuffle(grid, 2).contiguous()
