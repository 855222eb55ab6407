"""A tiny BAGEL: all of a released folder but what only understands pictures."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from flow_grpo.diffusers_patch.bagel.pipeline import BagelPipeline
from flow_grpo.diffusers_patch.bagel.transformer import BagelTransformer
from tiny.parts import LATENT_CHANNELS, kl_vae, qwen_tokenizer, seeded

GRID = 8  # tokens of the longest side


def bagel() -> BagelPipeline:
    tokenizer = qwen_tokenizer()
    start, end = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    transformer = seeded(
        BagelTransformer,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        patch_dim=4 * LATENT_CHANNELS,
        max_latent_size=GRID,
        start_of_image=start,
        end_of_image=end,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for name, weight in transformer.named_parameters():
            weight.copy_(_drawn(name, weight))
    return BagelPipeline(
        transformer=transformer,
        vae=kl_vae(scaling_factor=0.3611, shift_factor=0.1159, norm_num_groups=8),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _drawn(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Weights by which each token hears all others; none is a constant that hides a mistake."""
    noise = torch.randn_like(weight)
    if name.endswith("pos_embed"):
        return 0.5 * noise
    if "norm" in name:
        return 1 + 0.1 * noise
    if "embed_tokens" in name:
        return noise
    return 1.5 * noise / weight.shape[1] ** 0.5 if weight.ndim == 2 else 0.1 * noise
