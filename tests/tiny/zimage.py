"""A tiny Z-Image; Turbo differs in its weights and its shift alone."""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from tiny.parts import (
    JOINT_DIM,
    LATENT_CHANNELS,
    kl_vae,
    qwen3_encoder,
    qwen_tokenizer,
    tiny_transformer,
)


def zimage(shift: float = 6.0) -> ZImagePipeline:
    transformer = tiny_transformer(
        ZImageTransformer2DModel,
        in_channels=LATENT_CHANNELS,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=JOINT_DIM,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    return ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=kl_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=qwen3_encoder(tokenizer := qwen_tokenizer(), JOINT_DIM, num_layers=2),
        tokenizer=tokenizer,
    )


def zimage_turbo() -> ZImagePipeline:
    return zimage(shift=3.0)
