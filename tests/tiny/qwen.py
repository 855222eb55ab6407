"""Tiny Qwen-Image pipelines: text to image, and the three that edit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)

from flow_grpo.diffusers_patch.qwenimage_edit import PictureProcessor
from tiny.parts import (
    JOINT_DIM,
    LATENT_CHANNELS,
    WORDS,
    qwen_tokenizer,
    seeded,
    tiny_transformer,
)

PARTS = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "transformer"))


def qwenimage() -> QwenImagePipeline:
    return _pipeline(QwenImagePipeline)


def qwenimage_edit() -> QwenImageEditPipeline:
    return _pipeline(QwenImageEditPipeline)


def qwenimage_edit_2509() -> QwenImageEditPlusPipeline:
    return _pipeline(QwenImageEditPlusPipeline)


def qwenimage_edit_2511() -> QwenImageEditPlusPipeline:
    return _pipeline(QwenImageEditPlusPipeline, zero_cond_t=True)


@contextmanager
def stock_reference_area(area: int) -> Iterator[None]:
    """Make the stock pipelines scale references to `area` instead of 1024 x 1024 pixels."""
    honest = edit.calculate_dimensions, plus.VAE_IMAGE_SIZE
    edit.calculate_dimensions = lambda _, ratio: honest[0](area, ratio)
    plus.VAE_IMAGE_SIZE = area
    try:
        yield
    finally:
        edit.calculate_dimensions, plus.VAE_IMAGE_SIZE = honest


def _pipeline(stock: type[DiffusionPipeline], zero_cond_t: bool = False) -> DiffusionPipeline:
    """zero_cond_t: the references' tokens are modulated as at time 0."""
    edits = stock is not QwenImagePipeline
    empty = stock(**PARTS, processor=None) if edits else stock(**PARTS)
    tokenizer = qwen_tokenizer(_words(empty.prompt_template_encode))
    parts = {
        "transformer": tiny_transformer(
            QwenImageTransformer2DModel,
            in_channels=4 * LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=JOINT_DIM,
            axes_dims_rope=(4, 6, 6),
            zero_cond_t=zero_cond_t,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            base_image_seq_len=256,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
        "vae": seeded(
            AutoencoderKLQwenImage,
            base_dim=8,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[-0.7, 0.1, 0.5, -0.2],
            latents_std=[2.8, 1.4, 2.3, 1.1],
        ),
        "text_encoder": encoder(tokenizer),
        "tokenizer": tokenizer,
    }
    if not edits:
        return stock(**parts)
    pixels = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=112 * 112)
    pipe = stock(**parts, processor=PictureProcessor(pixels, tokenizer))
    pipe.register_to_config(processor=("transformers", "Qwen2VLProcessor"))  # as in released ones
    return pipe


def _words(template: str) -> list[str]:
    """Return WORDS and a template's, so that its instructions have about their real length."""
    text = re.sub(r"<\|\w+\|>|{}", "", template) + " " + " ".join(WORDS)
    pieces = Qwen2Tokenizer()._tokenizer.pre_tokenizer.pre_tokenize_str(text)
    found = dict.fromkeys(piece for piece, _ in pieces)
    # A word behind a space first: "the" would take the letters of " the".
    return sorted(found, key=lambda piece: not piece.startswith("Ġ")) + list(WORDS)


def encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    number = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=JOINT_DIM,
            intermediate_size=JOINT_DIM,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3]),
            bos_token_id=number("<|endoftext|>"),
            eos_token_id=number("<|im_end|>"),
            pad_token_id=number("<|endoftext|>"),
        ),
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=32,
            num_heads=2,
            out_hidden_size=JOINT_DIM,
            fullatt_block_indexes=[1],
        ),
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )
    return seeded(Qwen2_5_VLForConditionalGeneration, config)
