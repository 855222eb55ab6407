"""FLUX.1: packed latents (H/16 * W/16, 64), embedded guidance, a shift that grows with the size."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from flow_grpo.diffusers_patch.base import JOINT_ATTENTION, PatchedPipeline
from flow_grpo.rollout import Cond, Size


class Flux(PatchedPipeline):
    """A token is 2 x 2 latents. Checkpoints without a guidance embedding ignore guidance_scale."""

    stock = FluxPipeline
    lora_target_modules = (
        *JOINT_ATTENTION,
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )
    runs_in_fp16 = False

    def __init__(self, pipe: DiffusionPipeline):
        super().__init__(pipe)
        self.embeds_guidance = pipe.transformer.config.guidance_embeds

    @torch.no_grad()
    def encode(self, prompts: list[str], images: list[tuple], max_length: int) -> list[Cond]:
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self.device, max_sequence_length=max_length
        )
        return [
            Cond({"embeds": e, "pooled": p})
            for e, p in zip(embeds.cpu(), pooled.cpu(), strict=True)
        ]

    def needs_negative(self, guidance_scale: float) -> bool:
        return False  # the scale is one of the transformer's inputs

    def initial_latents(self, size: Size, noise: Tensor) -> Tensor:
        return pack(noise)

    def grid(self, size: Size) -> tuple[int, int]:
        """Return the picture's height and width in tokens."""
        return size.height // (self.vae_scale * 2), size.width // (self.vae_scale * 2)

    def schedule(self, num_steps: int, size: Size) -> dict:
        height, width = self.grid(size)
        mu = self.dynamic_shift(height * width, max_shift=1.15)
        return {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps), "mu": mu}

    def image_tokens(
        self, latents: Tensor, cond: dict[str, Tensor], size: Size
    ) -> tuple[Tensor, Tensor]:
        """Return what the transformer sees, (B, T, C), and where each token lies, (T, 3).

        The picture that is denoised comes first.
        """
        return latents, position_ids(0, *self.grid(size), latents.device)

    def velocity(self, model, latents, sigma, cond, negative, guidance_scale, size) -> Tensor:
        tokens, ids = self.image_tokens(latents, cond, size)
        guidance = sigma.new_full(sigma.shape, guidance_scale) if self.embeds_guidance else None
        embeds = cond["embeds"].to(self.input_dtype)
        velocity = model(
            hidden_states=tokens.to(self.input_dtype),
            timestep=sigma * 1000 / 1000,  # as stock does in fp32; in bf16 it rounds before
            guidance=guidance,
            pooled_projections=cond["pooled"].to(self.input_dtype),
            encoder_hidden_states=embeds,
            txt_ids=ids.new_zeros(embeds.shape[1], 3),
            img_ids=ids,
            return_dict=False,
        )[0]
        return velocity[:, : latents.shape[1]].float()

    def decode(self, latents: Tensor, size: Size) -> Tensor:
        return super().decode(unpack(latents, *self.grid(size)), size)


def pack(latents: Tensor) -> Tensor:
    """Turn latents (B, C, h, w) into tokens (B, h/2 * w/2, 4 C), row after row."""
    return pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2).contiguous()


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Undo pack. height, width: in tokens."""
    grid = tokens.transpose(1, 2).unflatten(2, (height, width))
    return pixel_shuffle(grid, 2).contiguous()


def position_ids(image: int, height: int, width: int, device: torch.device) -> Tensor:
    """Return each token's (image, row, column), (height * width, 3) fp32. image: 0 is denoised."""
    return torch.cartesian_prod(
        torch.full((1,), float(image), device=device),
        torch.arange(height, dtype=torch.float32, device=device),
        torch.arange(width, dtype=torch.float32, device=device),
    )
