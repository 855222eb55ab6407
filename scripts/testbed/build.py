"""Build the testbed's base: a complete Stable Diffusion 3 pipeline with 3 million parameters.

Every part is the real class (two CLIP text encoders, T5, SD3 transformer, KL autoencoder, their
tokenizers), so that what loads and trains the base is what loads and trains stable-diffusion-3.5.
Nothing is downloaded.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from flow_grpo.rewards.rules.shapes import COLORS, SHAPES, SIDE

CLIP_LENGTH = (
    10  # tokens of the longest prompt, "a red circle left of a blue square", with its two marks
)
T5_LENGTH = 10  # max_sequence_length to call the pipeline with; the text is most of a step's tokens
CLIP_HIDDEN = 64
JOINT_DIM = 2 * CLIP_HIDDEN  # width of the text tokens: both CLIPs side by side, and T5's d_model
LATENT_CHANNELS = 16
WORDS = (
    *(
        "a",
        "an",
        "small",
        "large",
        "two",
        "three",
        "four",
        "and",
        "left",
        "right",
        "of",
        "above",
        "below",
    ),
    *COLORS,
    *SHAPES,
    *(f"{shape}s" for shape in SHAPES),
)


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of `pair` in a word's pieces, from the left."""
    joined: list[str] = []
    for piece in word:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def word_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Learn byte-pair merges until each word is one token, ties broken by the alphabet.

    tokenizers' BpeTrainer breaks ties in an order that differs from process to process, and the
    vocabulary with it. Merging word by word from the left would not do either: "r e", learnt from
    "red", then splits "green".
    """
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        pieces = [_merge(word, best) for word in pieces]
    return merges


def clip_tokenizer() -> CLIPTokenizer:
    """Build a CLIP tokenizer with one token a word of the world and byte tokens for all else."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = word_merges(WORDS)
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *map("".join, merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    """Build a T5 tokenizer with one piece a word of the world and ASCII characters for all else."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(chr(code), -6.0) for code in range(33, 127)]
    vocab += [("▁" + word, -7.0) for word in WORDS]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=T5_LENGTH)


def clip_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Build one of the two CLIP text encoders, with weights from torch's global generator."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_HIDDEN,
        intermediate_size=2 * CLIP_HIDDEN,
        projection_dim=CLIP_HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModelWithProjection(config)
    for name, parameter in model.named_parameters():
        if "embedding" in name:
            # CLIP's own 0.02 suits 400 million captions, not some thousand steps.
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def t5_text_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Build the third text encoder, with weights from torch's global generator."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=JOINT_DIM,
        d_kv=32,
        d_ff=JOINT_DIM,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def transformer(width: int = 128, num_layers: int = 4) -> SD3Transformer2DModel:
    """Build the SD3 transformer: 16 image tokens; adaLN and output start at zero, as in DiT."""
    model = SD3Transformer2DModel(
        sample_size=SIDE // 4,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=num_layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=JOINT_DIM,
        caption_projection_dim=width,
        pooled_projection_dim=2 * CLIP_HIDDEN,
        pos_embed_max_size=SIDE // 8,
        qk_norm="rms_norm",
    )
    for name, module in model.named_modules():
        if name == "proj_out" or (name.endswith("linear") and "norm" in name):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return model


def autoencoder() -> AutoencoderKL:
    """Build the autoencoder: 32 x 32 pixels to 8 x 8 latents of 16 channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIDE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def pipeline(vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """Put an untrained transformer and untrained text encoders around a trained autoencoder."""
    clips = [clip_tokenizer(), clip_tokenizer()]
    t5 = t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=clip_text_encoder(clips[0]),
        tokenizer=clips[0],
        text_encoder_2=clip_text_encoder(clips[1]),
        tokenizer_2=clips[1],
        text_encoder_3=t5_text_encoder(t5),
        tokenizer_3=t5,
    )
