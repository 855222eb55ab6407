"""A tiny Stable Diffusion 3, with and without its third text encoder."""

from __future__ import annotations

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModelWithProjection

from tiny.parts import (
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


def sd3(with_t5: bool = True) -> StableDiffusion3Pipeline:
    tokenizer = clip_tokenizer()
    transformer = tiny_transformer(
        SD3Transformer2DModel,
        sample_size=8,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=JOINT_DIM,
        caption_projection_dim=32,
        pooled_projection_dim=2 * POOLED_DIM,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip_encoder(CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=clip_encoder(CLIPTextModelWithProjection, tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=t5_encoder(t5_tokenizer()) if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )


def sd3_without_t5() -> StableDiffusion3Pipeline:
    return sd3(with_t5=False)
