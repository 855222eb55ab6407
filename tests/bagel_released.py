"""The released ema.safetensors by name, shape and dtype, without a weight in it.

Of a complete list of its names and of the configs beside it; their sum is the published size of the
file, 27.21 GiB.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

CONFIG = {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
WIDTH, INNER, KEYS, HEAD = 3584, 18_944, 512, 128
VIT, VIT_INNER = 1152, 4304
MODEL, SEEN = "language_model.model.", "vit_model.vision_model."


def shapes() -> dict[str, tuple[int, ...]]:
    """Return each weight's shape by its name, in no order."""
    found = {
        f"{MODEL}embed_tokens.weight": (152_064, WIDTH),
        "language_model.lm_head.weight": (152_064, WIDTH),
        f"{MODEL}norm.weight": (WIDTH,),
        f"{MODEL}norm_moe_gen.weight": (WIDTH,),
        "latent_pos_embed.pos_embed": (4096, WIDTH),
        "vit_pos_embed.pos_embed": (4900, WIDTH),
        f"{SEEN}embeddings.position_embedding.weight": (4900, VIT),
        **linear("time_embedder.mlp.0", WIDTH, 256),
        **linear("time_embedder.mlp.2", WIDTH, WIDTH),
        **linear("vae2llm", WIDTH, 64),
        **linear("llm2vae", 64, WIDTH),
        **linear("connector.fc1", WIDTH, VIT),
        **linear("connector.fc2", WIDTH, WIDTH),
        **linear(f"{SEEN}embeddings.patch_embedding", VIT, 588),
        **norm(f"{SEEN}post_layernorm"),
    }
    for layer in (f"{MODEL}layers.{i}." for i in range(28)):
        for expert in ("", "_moe_gen"):
            for part, width in (("q", WIDTH), ("k", KEYS), ("v", KEYS)):
                found |= linear(f"{layer}self_attn.{part}_proj{expert}", width, WIDTH)
            found[f"{layer}self_attn.o_proj{expert}.weight"] = (WIDTH, WIDTH)
            for part in "qk":
                found[f"{layer}self_attn.{part}_norm{expert}.weight"] = (HEAD,)
            for part in ("gate", "up"):
                found[f"{layer}mlp{expert}.{part}_proj.weight"] = (INNER, WIDTH)
            found[f"{layer}mlp{expert}.down_proj.weight"] = (WIDTH, INNER)
            for part in ("input", "post_attention"):
                found[f"{layer}{part}_layernorm{expert}.weight"] = (WIDTH,)
    for layer in (f"{SEEN}encoder.layers.{i}." for i in range(26)):
        for part in ("q", "k", "v", "out"):
            found |= linear(f"{layer}self_attn.{part}_proj", VIT, VIT)
        found |= linear(f"{layer}mlp.fc1", VIT_INNER, VIT)
        found |= linear(f"{layer}mlp.fc2", VIT, VIT_INNER)
        found |= norm(f"{layer}layer_norm1") | norm(f"{layer}layer_norm2")
    return found


def linear(name: str, out: int, given: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, given), f"{name}.bias": (out,)}


def norm(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (VIT,), f"{name}.bias": (VIT,)}


def write(folder: Path) -> Path:
    """Write config and weights at true size; the file is a hole that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes().items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "ema.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "llm_config.json").write_text(json.dumps(CONFIG))
    return folder
