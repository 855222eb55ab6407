"""A tiny Wan2.1 with the scheduler that released folders ship, and what differs in Wan2.2 TI2V."""

from __future__ import annotations

from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5Config, UMT5EncoderModel

from tiny.parts import (
    JOINT_DIM,
    LATENT_CHANNELS,
    seeded,
    t5_encoder,
    t5_tokenizer,
    tiny_transformer,
)

WAN2_2_VAE = {  # 16 pixels a latent
    "is_residual": True,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "in_channels": 12,
    "out_channels": 12,
}


def wan(expand_timesteps: bool = False, **vae_sizes) -> WanPipeline:
    transformer = tiny_transformer(
        WanTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=JOINT_DIM,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=64,
    )
    vae = seeded(
        AutoencoderKLWan,
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[-0.7, 0.1, 0.5, -0.2],
        latents_std=[2.8, 1.4, 2.3, 1.1],
        **vae_sizes,
    )
    return WanPipeline(
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=vae,
        text_encoder=t5_encoder(tokenizer := t5_tokenizer(), UMT5EncoderModel, UMT5Config),
        tokenizer=tokenizer,
        expand_timesteps=expand_timesteps,
    )


def wan2_2() -> WanPipeline:
    return wan(expand_timesteps=True, **WAN2_2_VAE)
