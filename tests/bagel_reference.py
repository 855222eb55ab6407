"""BAGEL's velocity once more, in fp64, from the formulas alone.

One sequence [text | start | picture | end] without a cache, an explicit mask, softmax by hand; each
token's expert is chosen by a bool vector from the results of both. Knows nothing of flow_grpo or
transformers: a function on a state dict.
"""

import math

import torch
from torch import Tensor

F64 = torch.float64
MODEL = "language_model.model."


def velocity(
    state: dict[str, Tensor],
    ids: list[int],
    tokens: Tensor,
    time: float,
    grid: tuple[int, int],
    marks: tuple[int, int],
    heads: tuple[int, int],
    theta: float = 1e6,
) -> Tensor:
    """Return x1 - x0 (n, patch_dim) of one picture.

    ids: the prompt with its own marks, [] for none. tokens: (n, patch_dim). grid: rows and columns.
    marks: the start's and the end's id. heads: of queries, and of keys.
    """
    weight = {name: value.to(F64) for name, value in state.items()}
    layers = 1 + max(int(name.split(".")[3]) for name in weight if ".layers." in name)
    side = math.isqrt(len(weight["latent_pos_embed.pos_embed"]))
    num_text, n = len(ids), len(tokens)
    places = [row * side + column for row in range(grid[0]) for column in range(grid[1])]
    words = weight[f"{MODEL}embed_tokens.weight"]
    picture = affine(weight, "vae2llm", tokens.to(F64)) + embedded(weight, time)
    picture = picture + weight["latent_pos_embed.pos_embed"][places]
    sequence = torch.cat([words[ids], words[[marks[0]]], picture, words[[marks[1]]]])
    is_picture = torch.zeros(len(sequence), dtype=torch.bool)
    is_picture[num_text + 1 : num_text + 1 + n] = True
    seen = torch.ones(len(sequence), len(sequence), dtype=torch.bool)
    for i in range(num_text):
        seen[i, i + 1 :] = False
    position = torch.tensor([*range(num_text), *[num_text] * (n + 2)], dtype=F64)

    def chosen(make, name):
        """Let both experts compute, and take each token's."""
        both = [make(name.replace("*", ending)) for ending in ("_moe_gen", "")]
        return torch.where(is_picture.view(-1, *[1] * (both[0].ndim - 1)), *both)

    def projected(name, given):
        return chosen(lambda each: affine(weight, each, given), name)

    def normed(name, given):
        return chosen(lambda each: rms(weight[f"{each}.weight"], given), name)

    for layer in (f"{MODEL}layers.{i}." for i in range(layers)):
        given, parts = normed(f"{layer}input_layernorm*", sequence), {}
        for part, count in zip("qkv", (heads[0], heads[1], heads[1]), strict=True):
            flat = projected(f"{layer}self_attn.{part}_proj*", given)
            parts[part] = flat.view(len(sequence), count, -1)
        for part in "qk":
            parts[part] = turned(
                normed(f"{layer}self_attn.{part}_norm*", parts[part]), position, theta
            )
        heard = attended(parts["q"], parts["k"], parts["v"], seen)
        sequence = sequence + projected(f"{layer}self_attn.o_proj*", heard)
        given = normed(f"{layer}post_attention_layernorm*", sequence)
        gate, up = (projected(f"{layer}mlp*.{part}_proj", given) for part in ("gate", "up"))
        sequence = sequence + projected(f"{layer}mlp*.down_proj", gate * torch.sigmoid(gate) * up)
    final = rms(weight[f"{MODEL}norm_moe_gen.weight"], sequence[is_picture])
    return affine(weight, "llm2vae", final)


def affine(weight: dict[str, Tensor], name: str, given: Tensor) -> Tensor:
    return given @ weight[f"{name}.weight"].T + weight.get(f"{name}.bias", 0)


def rms(scale: Tensor, given: Tensor) -> Tensor:
    return scale * given / torch.sqrt(given.pow(2).mean(-1, keepdim=True) + 1e-6)


def embedded(weight: dict[str, Tensor], time: float) -> Tensor:
    """Embed the time as it is: 128 cosines, then 128 sines, of frequencies 1 ... 1 / 10000."""
    angles = time * 10_000 ** (-torch.arange(128, dtype=F64) / 128)
    hidden = affine(weight, "time_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()]))
    return affine(weight, "time_embedder.mlp.2", hidden * torch.sigmoid(hidden))


def turned(heads: Tensor, position: Tensor, theta: float) -> Tensor:
    """Turn the pairs (i, i + d / 2) of each head (N, heads, d) by position x frequency."""
    half = heads.shape[-1] // 2
    angle = position[:, None, None] * theta ** (-torch.arange(half, dtype=F64) / half)
    left, right = heads[..., :half], heads[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def attended(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """Return what each token hears, (N, C); head i of the queries asks head i * kv // q."""
    heard, share = [], query.shape[1] // key.shape[1]
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // share].T / math.sqrt(query.shape[-1])
        scores = scores.masked_fill(~seen, -math.inf)
        odds = torch.exp(scores - scores.max(-1, keepdim=True).values)
        heard.append(odds / odds.sum(-1, keepdim=True) @ value[:, head // share])
    return torch.cat(heard, -1)


def guided(c: Tensor, u: Tensor, scale: float, least: float = 0.0) -> Tensor:
    """Guide one picture's velocity; its norm over all tokens may not exceed c's."""
    found = u + scale * (c - u)
    return found * min(max((c.norm() / (found.norm() + 1e-8)).item(), least), 1.0)
