"""BAGEL's transformer (arXiv:2505.14683): a language model with a second expert, for pictures.

Parameters have the names of the released file. Of that it lacks what draws nothing: lm_head, the
understanding expert's last norm, the ViT and its connector.
"""

from __future__ import annotations

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm, rotate_half

UNDERSTANDING, GENERATION = "", "_moe_gen"  # how the names of the two experts' modules end
TIME_WIDTH = 256
Rope = tuple[Tensor, Tensor]  # cos and sin of the tokens' angles, (B, T, 1, head_dim) fp32


class Attention(nn.Module):
    """Each expert has projections and norms of its own; its tokens hear those of the other."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.repeats = config.num_attention_heads // config.num_key_value_heads
        heads = {"q": config.num_attention_heads}
        heads |= dict.fromkeys("kv", config.num_key_value_heads)
        for expert in (UNDERSTANDING, GENERATION):
            for name, count in heads.items():
                layer = nn.Linear(config.hidden_size, count * self.head_dim)
                self.add_module(f"{name}_proj{expert}", layer)
            layer = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
            self.add_module(f"o_proj{expert}", layer)
            for name in "qk":
                norm = Qwen2RMSNorm(self.head_dim, config.rms_norm_eps)
                self.add_module(f"{name}_norm{expert}", norm)

    def project(self, expert: str, tokens: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, (B, T, heads, head_dim) each; norm and rope in fp32."""
        part = self.get_submodule
        query, key, value = (
            part(f"{name}_proj{expert}")(tokens).unflatten(-1, (-1, self.head_dim))
            for name in "qkv"
        )
        query, key = (
            _turned(part(f"{name}_norm{expert}")(each.float()), rope).to(value.dtype)
            for name, each in (("q", query), ("k", key))
        )
        return query, key, value

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool = False
    ) -> Tensor:
        """Return what tokens hear, (B, T, C). mask: (B, 1, 1, keys) bool, those that are heard."""
        # By hand: torch has no fast kernel for grouped heads and a mask together.
        key, value = (each.repeat_interleave(self.repeats, dim=2) for each in (key, value))
        rows = (each.transpose(1, 2) for each in (query, key, value))
        heard = scaled_dot_product_attention(*rows, attn_mask=mask, is_causal=causal)
        return heard.transpose(1, 2).flatten(2)


class Layer(nn.Module):
    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.self_attn = Attention(config)
        for expert in (UNDERSTANDING, GENERATION):
            self.add_module(f"mlp{expert}", Qwen2MLP(config))
            for name in ("input_layernorm", "post_attention_layernorm"):
                norm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)
                self.add_module(f"{name}{expert}", norm)

    def project(self, expert: str, tokens: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        normed = self.get_submodule(f"input_layernorm{expert}")(tokens)
        return self.self_attn.project(expert, normed, rope)

    def finish(self, expert: str, tokens: Tensor, heard: Tensor) -> Tensor:
        """Add what the tokens (B, T, C) heard, and what the expert makes of it."""
        part = self.get_submodule
        tokens = tokens + part(f"self_attn.o_proj{expert}")(heard)
        return tokens + part(f"mlp{expert}")(part(f"post_attention_layernorm{expert}")(tokens))

    def read(self, text: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Pass a prompt (1, L, C) on; return its keys and values too, (1, L, heads, head_dim)."""
        query, key, value = self.project(UNDERSTANDING, text, rope)
        heard = self.self_attn.attend(query, key, value, None, causal=True)
        return self.finish(UNDERSTANDING, text, heard), key, value

    def forward(
        self, image: Tensor, marks: Tensor, rope: Rope, text: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Pass a picture (B, n, C) and the marks around it (B, 2, C) on.

        text: (B, L, 2, heads, head_dim), the prompt's keys and values in this layer.
        """
        ours = self.project(GENERATION, image, rope)
        theirs = self.project(UNDERSTANDING, marks, rope)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(theirs, ours, strict=True))
        texts = text.to(value.dtype).unbind(2)
        key, value = (torch.cat(pair, dim=1) for pair in zip(texts, (key, value), strict=True))
        heard = self.self_attn.attend(query, key, value, mask)
        image = self.finish(GENERATION, image, heard[:, 2:])
        return image, self.finish(UNDERSTANDING, marks, heard[:, :2])


class TimeEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_WIDTH, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:
        """time: (B,), as it is, in [0, 1]. Returns (B, C)."""
        half = TIME_WIDTH // 2
        number = torch.arange(half, dtype=torch.float32, device=time.device)
        angles = time[:, None].float() * torch.exp(-math.log(10_000) * number / half)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class BagelTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Predicts a picture's velocity, given the keys and values of its prompt.

    patch_dim: numbers of a picture's token. max_latent_size: tokens of the longest side.
    start_of_image, end_of_image: ids of the two marks.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 152_064,
        hidden_size: int = 3584,
        intermediate_size: int = 18_944,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 28,
        num_key_value_heads: int = 4,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1e6,
        patch_dim: int = 64,
        max_latent_size: int = 64,
        start_of_image: int = 151_652,
        end_of_image: int = 151_653,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        config = Qwen2Config(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            rms_norm_eps=rms_norm_eps,
        )
        table = torch.zeros(max_latent_size**2, hidden_size)
        self.language_model = nn.Module()
        self.language_model.model = nn.Module()
        self.language_model.model.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        layers = nn.ModuleList(Layer(config) for _ in range(num_hidden_layers))
        self.language_model.model.layers = layers
        self.language_model.model.norm_moe_gen = Qwen2RMSNorm(hidden_size, rms_norm_eps)
        self.time_embedder = TimeEmbedder(hidden_size)
        self.vae2llm = nn.Linear(patch_dim, hidden_size)
        self.llm2vae = nn.Linear(hidden_size, patch_dim)
        self.latent_pos_embed = nn.Module()
        self.latent_pos_embed.pos_embed = nn.Parameter(table, requires_grad=False)

    @property
    def text_shape(self) -> tuple[int, ...]:
        """What a prompt's token is to a picture's: keys and values of each layer."""
        config = self.config
        head_dim = config.hidden_size // config.num_attention_heads
        return (config.num_hidden_layers, 2, config.num_key_value_heads, head_dim)

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """Return a prompt's keys and values, (L, *text_shape). ids: (L,).

        The understanding expert alone computes them, so they are constant while the other trains.
        """
        model, held = self.language_model.model, []
        rope = self._rope(torch.arange(len(ids), device=ids.device)[None])
        text = model.embed_tokens(ids)[None]
        for layer in model.layers:
            text, *kept = layer.read(text, rope)
            held.append(torch.cat(kept).transpose(0, 1))
        return torch.stack(held, dim=1)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        grid: tuple[int, int],
        text: Tensor,
        lengths: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Predict x1 - x0 of pictures, (B, n, patch_dim).

        hidden_states: (B, n, patch_dim), row after row. timestep: (B,) in [0, 1], 1 is noise. grid:
        the picture's rows and columns, n tokens. text: (B, L, *text_shape), of prefill(), padded.
        lengths: (B,) tokens of each row's text. mask: (B, L) bool, which they are; None: all.
        """
        config, model = self.config, self.language_model.model
        side, (rows, columns) = config.max_latent_size, grid
        place = self.latent_pos_embed.pos_embed.unflatten(0, (side, side))[:rows, :columns]
        image = self.vae2llm(hidden_states) + self.time_embedder(timestep)[:, None]
        image = image + place.flatten(0, 1)
        apart = config.end_of_image - config.start_of_image
        ids = config.start_of_image + apart * torch.arange(2, device=image.device)
        marks = model.embed_tokens(ids).expand(len(image), -1, -1)
        rope = self._rope(lengths[:, None])  # all stand where the text ends
        if mask is not None:
            mask = nn.functional.pad(mask, (0, image.shape[1] + 2), value=True)[:, None, None]
        for number, layer in enumerate(model.layers):
            given = image, marks, rope, text[:, :, number], mask
            if self.gradient_checkpointing and torch.is_grad_enabled():
                image, marks = self._gradient_checkpointing_func(layer, *given)
            else:
                image, marks = layer(*given)
        return self.llm2vae(model.norm_moe_gen(image))

    def _rope(self, positions: Tensor) -> Rope:
        """positions: (B, T) int64."""
        head_dim = self.text_shape[-1]
        even = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
        angles = positions[..., None] / self.config.rope_theta ** (even / head_dim)
        angles = torch.cat([angles, angles], dim=-1)[:, :, None]
        return angles.cos(), angles.sin()


def _turned(tokens: Tensor, rope: Rope) -> Tensor:
    cos, sin = rope
    return tokens * cos + rotate_half(tokens) * sin
