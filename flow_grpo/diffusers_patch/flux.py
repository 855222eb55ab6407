"""FLUX.1: packed latents (H/16 * W/16, 64), embedded guidance, a shift that grows with the size."""

import torch
from diffusers import FluxPipeline
from torch import Tensor

from flow_grpo.diffusers_patch.base import JOINT_ATTENTION
from flow_grpo.diffusers_patch.packed import Packed
from flow_grpo.records import Cond, Conditioning, Guidance, Size


class Flux(Packed):
    """Its scale is one of the transformer's inputs; checkpoints without one ignore it."""

    stock = FluxPipeline
    lora_target_modules = (
        *JOINT_ATTENTION,
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )
    runs_in_fp16 = False
    guides_by_two_passes = False

    @torch.no_grad()
    def encode(self, prompt: str, images: tuple, max_length: int) -> Cond:
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompt, device=self.device, max_sequence_length=max_length
        )
        return Cond({"embeds": embeds[0].cpu(), "pooled": pooled[0].cpu()})

    def stock_arguments(self, size: Size, guidance: Guidance, noise, images=()) -> dict:
        latents = self.initial_latents(size, noise)
        return super().stock_arguments(size, guidance, latents, images)

    def image_tokens(
        self, latents: Tensor, positive: dict[str, Tensor], size: Size
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens (B, T, C), those of the image first, and where each lies, (T, 3)."""
        return latents, position_ids(0, *self.grid(size), latents.device)

    def velocity(self, model, latents, sigma, conditioning: Conditioning) -> Tensor:
        positive, guidance = conditioning["positive"], None
        if self.transformer.config.guidance_embeds:
            guidance = sigma.new_full(sigma.shape, conditioning.guidance.scale)
        tokens, ids = self.image_tokens(latents, positive, conditioning.size)
        embeds = positive["embeds"].to(self.input_dtype)
        velocity = model(
            hidden_states=tokens.to(self.input_dtype),
            timestep=sigma * 1000 / 1000,  # as stock does in fp32; in bf16 it rounds before
            guidance=guidance,
            pooled_projections=positive["pooled"].to(self.input_dtype),
            encoder_hidden_states=embeds,
            txt_ids=ids.new_zeros(embeds.shape[1], 3),
            img_ids=ids,
            return_dict=False,
        )[0]
        return velocity[:, : latents.shape[1]].float()


def position_ids(image: int, height: int, width: int, device: torch.device) -> Tensor:
    """Return each token's (image, row, column), (height * width, 3) fp32. image: 0 is denoised."""
    return torch.cartesian_prod(
        torch.full((1,), float(image), device=device),
        torch.arange(height, dtype=torch.float32, device=device),
        torch.arange(width, dtype=torch.float32, device=device),
    )
