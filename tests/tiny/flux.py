"""Tiny FLUX.1 pipelines: dev, schnell and Kontext."""

from __future__ import annotations

from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextModel

from tiny.parts import (
    DYNAMIC_SHIFT,
    JOINT_DIM,
    LATENT_CHANNELS,
    POOLED_DIM,
    clip_encoder,
    clip_tokenizer,
    kl_vae,
    t5_encoder,
    t5_tokenizer,
    tiny_transformer,
)


def flux(
    stock: type[DiffusionPipeline] = FluxPipeline, embeds_guidance: bool = True
) -> DiffusionPipeline:
    transformer = tiny_transformer(
        FluxTransformer2DModel,
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=JOINT_DIM,
        pooled_projection_dim=POOLED_DIM,
        guidance_embeds=embeds_guidance,
        axes_dims_rope=(4, 6, 6),
    )
    return stock(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, **DYNAMIC_SHIFT),
        vae=kl_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip_encoder(CLIPTextModel, tokenizer := clip_tokenizer()),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(t5_tokenizer()),
        tokenizer_2=t5_tokenizer(),
    )


def flux_schnell() -> FluxPipeline:
    return flux(embeds_guidance=False)


def flux_kontext() -> FluxKontextPipeline:
    return flux(FluxKontextPipeline)
