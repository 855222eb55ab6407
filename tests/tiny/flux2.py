"""Tiny FLUX.2 kleins: base and distilled."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)

from tiny.parts import (
    DYNAMIC_SHIFT,
    LATENT_CHANNELS,
    kl_vae,
    qwen3_encoder,
    qwen_tokenizer,
    tiny_transformer,
)

TEXT_DIM, NUM_TEXT_LAYERS = 16, 28  # the text is what layers 9, 18 and 27 say


def flux2_klein(is_distilled: bool = False) -> Flux2KleinPipeline:
    transformer = tiny_transformer(
        Flux2Transformer2DModel,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * TEXT_DIM,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = kl_vae(AutoencoderKLFlux2)
    vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 4 * LATENT_CHANNELS))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2.0, 4 * LATENT_CHANNELS))
    return Flux2KleinPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, **DYNAMIC_SHIFT),
        vae=vae,
        text_encoder=qwen3_encoder(tokenizer := qwen_tokenizer(), TEXT_DIM, NUM_TEXT_LAYERS),
        tokenizer=tokenizer,
        is_distilled=is_distilled,
    )


def flux2_klein_distilled() -> Flux2KleinPipeline:
    return flux2_klein(is_distilled=True)
