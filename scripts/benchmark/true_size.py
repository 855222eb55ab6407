"""Released models at their true size, with random weights: what a benchmark trains.

Transformer and VAE have the released configs. The text encoders have the released widths and few
layers: their prompts are encoded once and kept, and what they give has the released shape.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny.parts import DYNAMIC_SHIFT, clip_tokenizer, qwen_tokenizer, t5_tokenizer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from flow_grpo.diffusers_patch.bagel.folder import mark_ids
from flow_grpo.diffusers_patch.bagel.pipeline import BagelPipeline
from flow_grpo.diffusers_patch.bagel.transformer import BagelTransformer
from flow_grpo.diffusers_patch.registry import INDEX_FILES

NUM_TEXT_LAYERS = 2  # of each text encoder; 12 to 36 are released


def sd3_5_medium() -> DiffusionPipeline:
    """Stable Diffusion 3.5 Medium: 2.24 B parameters, 24 blocks, two attentions in the first 13."""
    tokenizer = clip_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=_clip(CLIPTextModelWithProjection, tokenizer, width=768, num_heads=12),
        tokenizer=tokenizer,
        text_encoder_2=_clip(CLIPTextModelWithProjection, tokenizer, width=1280, num_heads=20),
        tokenizer_2=tokenizer,
        text_encoder_3=_t5(),
        tokenizer_3=t5_tokenizer(),
    )


def flux1_dev() -> DiffusionPipeline:
    """FLUX.1-dev: 11.9 B parameters, 19 blocks of two streams and 38 of one."""
    tokenizer = clip_tokenizer()
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=19,
            num_single_layers=38,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=True,
            axes_dims_rope=(16, 56, 56),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, **DYNAMIC_SHIFT),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=_clip(CLIPTextModel, tokenizer, width=768, num_heads=12),
        tokenizer=tokenizer,
        text_encoder_2=_t5(),
        tokenizer_2=t5_tokenizer(),
    )


def zimage() -> DiffusionPipeline:
    """Z-Image: 6.15 B parameters, 30 blocks of one stream."""
    tokenizer = qwen_tokenizer()
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(
            in_channels=16,
            dim=3840,
            n_layers=30,
            n_refiner_layers=2,
            n_heads=30,
            n_kv_heads=30,
            cap_feat_dim=2560,
            axes_dims=[32, 48, 48],
            axes_lens=[1536, 512, 512],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=2560,
                intermediate_size=9728,
                num_hidden_layers=NUM_TEXT_LAYERS,
                num_attention_heads=32,
                num_key_value_heads=8,
                head_dim=128,
            )
        ),
        tokenizer=tokenizer,
    )


def bagel(num_layers: int = 28, vocab_size: int = 152_064) -> DiffusionPipeline:
    """BAGEL-7B-MoT: 13.6 B parameters that draw, 28 layers of two experts."""
    tokenizer = qwen_tokenizer()
    start, end = mark_ids(tokenizer, "vision")
    transformer = BagelTransformer(
        vocab_size=vocab_size,
        num_hidden_layers=num_layers,
        start_of_image=start,
        end_of_image=end,
    )
    torch.nn.init.normal_(transformer.latent_pos_embed.pos_embed, std=0.5)  # zeros, as it is built
    return BagelPipeline(
        transformer=transformer,
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


MODELS: dict[str, tuple[Callable[[], DiffusionPipeline], str]] = {  # and the script that trains it
    "bagel": (bagel, "bagel"),
    "sd3_5_medium": (sd3_5_medium, "sd3"),
    "flux1_dev": (flux1_dev, "flux"),
    "zimage": (zimage, "zimage"),
}


def save(name: str, folder: Path) -> Path:
    """Write a model's folder in bf16, as from_pretrained reads it, unless it is there."""
    if not any((folder / index).exists() for index in INDEX_FILES):
        device, dtype = torch.get_default_device(), torch.get_default_dtype()
        torch.manual_seed(0)
        torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")  # draws faster
        torch.set_default_dtype(torch.bfloat16)
        try:
            pipeline = MODELS[name][0]()
        finally:
            torch.set_default_device(device)
            torch.set_default_dtype(dtype)
        pipeline.save_pretrained(folder)
    return folder


def _vae(**factors: float) -> AutoencoderKL:
    """The autoencoder of SD3 and FLUX.1: a side shrunk by 8, 16 channels."""
    return AutoencoderKL(
        sample_size=1024,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **factors,
    )


def _clip(
    stock: type[PreTrainedModel], tokenizer: CLIPTokenizer, width: int, num_heads: int
) -> PreTrainedModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_attention_heads=num_heads,
        num_hidden_layers=NUM_TEXT_LAYERS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return stock(config)


def _t5() -> T5EncoderModel:
    """T5-XXL's encoder."""
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=NUM_TEXT_LAYERS,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)
