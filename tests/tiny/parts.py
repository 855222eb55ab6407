"""What tiny pipelines are made of: autoencoders, text encoders, tokenizers, from random weights.

Nothing depends on the process, so two processes build equal weights and equal vocabularies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import AutoencoderKL
from tokenizers import AddedToken, pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTokenizer,
    PreTrainedModel,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

LENGTH = 64  # tokens of a prompt
WORDS = "a photo of the red green blue apple cube cat sign that says make it in two three".split()
JOINT_DIM, POOLED_DIM = 32, 16  # of the text tokens; of one CLIP's summary
LATENT_CHANNELS = 4
DYNAMIC_SHIFT = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}

QWEN_MARKS = (  # in the released order; a tokenizer without one would split it
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<think>",
    "</think>",
)
QWEN_CHAT = """\
{%- for message in messages -%}
<|im_start|>{{ message.role + '\\n' + message.content }}<|im_end|>{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\\n' }}
{%- if not enable_thinking %}<think>{{ '\\n\\n' }}</think>{{ '\\n\\n' }}{% endif -%}
{%- endif -%}"""


def seeded(build: Callable[..., nn.Module], *args, **sizes) -> nn.Module:
    """Build a module in eval mode, its random weights the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(*args, **sizes).eval()


def tiny_transformer(stock: type[nn.Module], **sizes) -> nn.Module:
    """Build a transformer whose tokens hear each other: default weights hardly mix them."""
    transformer = seeded(stock, **sizes)
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if ".attn." in name and weight.ndim == 2:
                weight *= 3
            elif "modulation" in name:  # what a block adds is multiplied by it
                weight *= 5
    return transformer


def kl_vae(stock: type[nn.Module] = AutoencoderKL, **factors: float) -> nn.Module:
    """An autoencoder that shrinks a side by 8, with latents of about unit size."""
    sizes = {
        "sample_size": 64,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "latent_channels": LATENT_CHANNELS,
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    vae = seeded(stock, **(sizes | factors))
    with torch.no_grad():
        vae.encoder.conv_out.weight *= 8
    return vae


def clip_encoder(stock: type[PreTrainedModel], tokenizer: CLIPTokenizer) -> PreTrainedModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=POOLED_DIM,
        intermediate_size=32,
        projection_dim=POOLED_DIM,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return seeded(stock, config)


def t5_encoder(
    tokenizer: T5Tokenizer,
    stock: type[PreTrainedModel] = T5EncoderModel,
    config: type[T5Config] = T5Config,
) -> PreTrainedModel:
    sizes = config(
        vocab_size=len(tokenizer),
        d_model=JOINT_DIM,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return seeded(stock, sizes)


def qwen3_encoder(tokenizer: Qwen2Tokenizer, width: int, num_layers: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    return seeded(Qwen3ForCausalLM, config)


def qwen_tokenizer(words: Sequence[str] = WORDS) -> Qwen2Tokenizer:
    vocab, merges = byte_pairs(words=words)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, padding_side="right")
    marks = [AddedToken(mark, special=True, normalized=False) for mark in QWEN_MARKS]
    tokenizer.add_tokens(marks)
    tokenizer.chat_template = QWEN_CHAT
    return tokenizer


def clip_tokenizer() -> CLIPTokenizer:
    vocab, merges = byte_pairs("</w>")
    for mark in ("<|startoftext|>", "<|endoftext|>"):
        vocab[mark] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """Splits into WORDS and single characters."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(chr(code), -6.0) for code in range(33, 127)]
    vocab += [("▁" + word, -7.0) for word in sorted(WORDS)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def byte_pairs(
    suffix: str = "", words: Sequence[str] = WORDS
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and merges of a byte-pair tokenizer; suffix: marks a word's end.

    tokenizers' BpeTrainer breaks ties in an order that differs from process to process: here each
    of `words` is merged from its left. Unseen words become bytes, so no token is unknown.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [letter + suffix for letter in alphabet if suffix]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = []
    for word in words:
        left, *rest = [*word[:-1], word[-1] + suffix]
        for letter in rest:
            if left + letter not in vocab:
                vocab[left + letter] = len(vocab)
                merges.append((left, letter))
            left += letter
    return vocab, merges
