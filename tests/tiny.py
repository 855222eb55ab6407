"""Tiny pipelines with random weights: every class is the released model's, only its sizes are not.

Nothing is downloaded and nothing depends on the process, so two processes build equal weights and
equal vocabularies. A model is one function and one line in MODELS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from flow_grpo.conditioning import Conditioner
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.diffusers_patch.flux import Flux
from flow_grpo.diffusers_patch.flux_kontext import FluxKontext
from flow_grpo.diffusers_patch.sd3 import SD3
from flow_grpo.rollout import PromptBatch, Size

LENGTH = 32  # tokens of a prompt
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


MODELS: dict[str, tuple[type[PatchedPipeline], Callable[[], DiffusionPipeline]]] = {
    "sd3": (SD3, sd3),
    "sd3_without_t5": (SD3, sd3_without_t5),
    "flux": (Flux, flux),
    "flux_schnell": (Flux, flux_schnell),
    "flux_kontext": (FluxKontext, flux_kontext),
}
EDITS = {"flux_kontext"}  # those that need a reference picture


def patched(name: str) -> PatchedPipeline:
    family, build = MODELS[name]
    return family(build())


def save(name: str, folder: str | Path) -> Path:
    """Write a pipeline's folder, as from_pretrained reads it, and return it."""
    MODELS[name][1]().save_pretrained(folder)
    return Path(folder)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Draw noise, uint8 (height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def prompt_batch(
    model: PatchedPipeline,
    size: Size,
    texts: Sequence[str],
    references: Sequence[tuple],
    guidance: float,
    owners: Sequence[tuple[int, int]] | None = None,
) -> PromptBatch:
    """Condition rows on their group's text and references.

    owners: (group, member) of each row; None: one row a group.
    """
    conditioner = Conditioner(model, LENGTH)
    group, member = torch.tensor(owners or [(g, 0) for g in range(len(texts))]).unbind(1)
    rows = [(text, (f"{g}.png",), references[g]) for g, text in enumerate(texts)]
    negatives = None
    if model.needs_negative(guidance):
        negatives = [conditioner.negative(names, images) for _, names, images in rows]
    return PromptBatch(
        conds=[conditioner.cond(*row) for row in rows],
        negatives=negatives,
        index=group,
        group=group,
        member=member,
        size=size,
        prompts=[texts[g] for g in group.tolist()],
        metadata=[{} for _ in group],
    )


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
    return transformer


def kl_vae(**factors: float) -> AutoencoderKL:
    """An autoencoder that shrinks a side by 8, with latents of about unit size."""
    vae = seeded(
        AutoencoderKL,
        sample_size=64,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **factors,
    )
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


def t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=JOINT_DIM,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return seeded(T5EncoderModel, config)


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


def byte_pairs(suffix: str = "") -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and merges of a byte-pair tokenizer; suffix: marks a word's end.

    tokenizers' BpeTrainer breaks ties in an order that differs from process to process: here each
    of WORDS is merged from its left. Unseen words become bytes, so no token is unknown.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [letter + suffix for letter in alphabet if suffix]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = []
    for word in WORDS:
        left, *rest = [*word[:-1], word[-1] + suffix]
        for letter in rest:
            if left + letter not in vocab:
                vocab[left + letter] = len(vocab)
                merges.append((left, letter))
            left += letter
    return vocab, merges
