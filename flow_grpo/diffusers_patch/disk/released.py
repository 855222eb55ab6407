"""Released models as their folders describe them, for where the folders are not on this machine."""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Released:
    """A pipeline's parts, as their config.json files have them, without any weight."""

    pipeline: str  # the stock class
    transformer: dict
    vae: dict
    encoders: dict[str, int]  # parameters of each
    scheduler: dict
    settings: dict = field(default_factory=dict)  # model_index.json's own


T5_XXL, UMT5_XXL, QWEN3_4B, QWEN25_VL_7B = (
    4_762_310_656,
    5_680_910_336,
    4_022_468_096,
    8_292_166_656,
)
CLIP_L, CLIP_G = 123_650_304, 694_659_840


def _autoencoder_kl(**factors: float) -> dict:
    """The autoencoder of SD3, FLUX.1 and Z-Image: a side shrunk by 8, 16 channels."""
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": 1024,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 16,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        **factors,
    }


def _scheduler(shift: float, dynamic: bool = False) -> dict:
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "shift": shift,
        "use_dynamic_shifting": dynamic,
    }


SD3_5_MEDIUM = Released(
    "StableDiffusion3Pipeline",
    transformer={
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    vae=_autoencoder_kl(scaling_factor=1.5305, shift_factor=0.0609),
    encoders={"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL},
    scheduler=_scheduler(3.0),
)
SD3_5_LARGE = replace(
    SD3_5_MEDIUM,
    transformer=SD3_5_MEDIUM.transformer
    | {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
        "dual_attention_layers": (),
    },
)
FLUX1_DEV = Released(
    "FluxPipeline",
    transformer={
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
    vae=_autoencoder_kl(scaling_factor=0.3611, shift_factor=0.1159),
    encoders={"text_encoder": CLIP_L, "text_encoder_2": T5_XXL},
    scheduler=_scheduler(3.0, dynamic=True),
)
FLUX2_KLEIN = Released(
    "Flux2KleinPipeline",
    transformer={
        "_class_name": "Flux2Transformer2DModel",
        "patch_size": 1,
        "in_channels": 128,
        "num_layers": 5,
        "num_single_layers": 20,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "axes_dims_rope": (32, 32, 32, 32),
        "guidance_embeds": False,
    },
    vae={"_class_name": "AutoencoderKLFlux2"},
    encoders={"text_encoder": QWEN3_4B},
    scheduler=_scheduler(3.0, dynamic=True),
)
QWEN_IMAGE = Released(
    "QwenImagePipeline",
    transformer={"_class_name": "QwenImageTransformer2DModel"},  # its defaults: 60 blocks
    vae={"_class_name": "AutoencoderKLQwenImage"},
    encoders={"text_encoder": QWEN25_VL_7B},
    scheduler=_scheduler(1.0, dynamic=True),
)
ZIMAGE = Released(
    "ZImagePipeline",
    transformer={
        "_class_name": "ZImageTransformer2DModel",
        "in_channels": 16,
        "dim": 3840,
        "n_layers": 30,
        "n_refiner_layers": 2,
        "n_heads": 30,
        "n_kv_heads": 30,
        "cap_feat_dim": 2560,
        "axes_dims": (32, 48, 48),
        "axes_lens": (1536, 512, 512),
    },
    vae=FLUX1_DEV.vae,
    encoders={"text_encoder": QWEN3_4B},
    scheduler=_scheduler(6.0),
)
WAN2_1 = Released(
    "WanPipeline",
    transformer={
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": 12,
        "attention_head_dim": 128,
        "ffn_dim": 8960,
        "num_layers": 30,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
    },
    vae={"_class_name": "AutoencoderKLWan"},
    encoders={"text_encoder": UMT5_XXL},
    scheduler=_scheduler(3.0),
)
WAN2_2_TI2V = replace(
    WAN2_1,
    transformer=WAN2_1.transformer
    | {"num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48},
    vae={
        "_class_name": "AutoencoderKLWan",
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "is_residual": True,
        "scale_factor_spatial": 16,
        "latents_mean": (0.0,) * 48,  # the released ones move no byte
        "latents_std": (1.0,) * 48,
    },
    settings={"expand_timesteps": True},
)

RELEASED: dict[str, Released] = {  # by its name on the hub
    "Qwen/Qwen-Image": QWEN_IMAGE,
    "Qwen/Qwen-Image-Edit": replace(QWEN_IMAGE, pipeline="QwenImageEditPipeline"),
    "Qwen/Qwen-Image-Edit-2509": replace(QWEN_IMAGE, pipeline="QwenImageEditPlusPipeline"),
    "Qwen/Qwen-Image-Edit-2511": replace(QWEN_IMAGE, pipeline="QwenImageEditPlusPipeline"),
    "Tongyi-MAI/Z-Image": ZIMAGE,
    "Tongyi-MAI/Z-Image-Turbo": ZIMAGE,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": WAN2_1,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": WAN2_2_TI2V,
    "black-forest-labs/FLUX.1-Kontext-dev": replace(FLUX1_DEV, pipeline="FluxKontextPipeline"),
    "black-forest-labs/FLUX.1-dev": FLUX1_DEV,
    "black-forest-labs/FLUX.2-klein-base-4B": FLUX2_KLEIN,
    "stabilityai/stable-diffusion-3.5-large": SD3_5_LARGE,
    "stabilityai/stable-diffusion-3.5-medium": SD3_5_MEDIUM,
}
