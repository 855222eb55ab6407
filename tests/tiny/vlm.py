"""Tiny vision-language models that answer: folders as the released ones have them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    PreTrainedModel,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from tiny.parts import JOINT_DIM, WORDS, qwen_tokenizer, seeded
from tiny.qwen import encoder

ANSWERS = "Yes yes No no two three four".split()
CHAT = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}{{ '\\n' }}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}<|im_end|>{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\\n' }}{%- endif -%}"""


def save(kind: str, folder: Path) -> None:
    """Write a model of random weights whose answers depend on pictures and text."""
    tokenizer = qwen_tokenizer([*ANSWERS, *WORDS])
    tokenizer.chat_template = CHAT
    model = {"qwen2_5_vl": encoder, "qwen3_vl": _qwen3}[kind](tokenizer)
    with torch.no_grad():  # random features hardly differ otherwise
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight *= 6
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    patch = model.config.vision_config.patch_size
    Qwen2VLImageProcessorPil(
        min_pixels=4 * patch**2, max_pixels=64 * patch**2, patch_size=patch
    ).save_pretrained(folder)


def _qwen3(tokenizer: Qwen2Tokenizer) -> PreTrainedModel:
    number = tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=JOINT_DIM,
            intermediate_size=JOINT_DIM,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 2, 2]),
        ),
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=32,
            num_heads=2,
            out_hidden_size=JOINT_DIM,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0],
        ),
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )
    return seeded(Qwen3VLForConditionalGeneration, config)
