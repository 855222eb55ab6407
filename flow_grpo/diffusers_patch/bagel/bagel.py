"""BAGEL-7B-MoT (arXiv:2505.14683): tokens (H/16 * W/16, 64), a prompt as keys and values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from flow_grpo.diffusers_patch.bagel import folder as disk
from flow_grpo.diffusers_patch.bagel import pipeline
from flow_grpo.diffusers_patch.bagel.transformer import GENERATION, BagelTransformer
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.records import Cond, Conditioning, Guidance, Size

PATCH = 16  # pixels of a token, one way


class Bagel(PatchedPipeline):
    """Draws from text. Its generation expert trains.

    The understanding expert reads the prompt, once: keys and values are kept, and cut to a call's
    longest, so that rows of one prompt need no mask. It is part of the transformer.
    """

    stock = pipeline.BagelPipeline
    index_file = disk.CONFIG
    single_files = (disk.WEIGHTS, disk.VAE)
    trained_part = GENERATION
    reads_by_transformer = True
    lora_target_modules = (
        "mlp_moe_gen.down_proj",
        "mlp_moe_gen.gate_proj",
        "mlp_moe_gen.up_proj",
        "self_attn.k_proj_moe_gen",
        "self_attn.o_proj_moe_gen",
        "self_attn.q_proj_moe_gen",
        "self_attn.v_proj_moe_gen",
    )
    runs_in_fp16 = False
    has_attention_backends = False
    compiles = False
    ragged_text = True

    @torch.no_grad()
    def encode(self, prompt: str, images: tuple, max_length: int) -> Cond:
        return Cond({"embeds": self.pipe.text(prompt, max_length).flatten(1).cpu()})

    def negative(self, images: tuple, max_length: int) -> Cond:
        return Cond({"embeds": self.pipe.no_text().flatten(1)})

    def collate(self, conds: list[Cond], pad_to: int) -> dict[str, Tensor]:
        rows = super().collate(conds, 0)
        lengths, width = rows["lengths"], rows["embeds"].shape[1]
        if lengths.min() < width:  # else without a mask, as a lone prompt
            rows["mask"] = (torch.arange(width) < lengths[:, None]).to(self.device)
        rows["lengths"] = lengths.to(self.device)
        return rows

    def grid(self, size: Size) -> tuple[int, int]:
        """Return the image's height and width in tokens."""
        return size.height // (self.vae_scale * 2), size.width // (self.vae_scale * 2)

    def noise_shape(self, size: Size) -> tuple[int, ...]:
        rows, columns = self.grid(size)
        return (rows * columns, self.transformer.config.patch_dim)

    def scheduler_arguments(self, num_steps: int, size: Size) -> dict:
        return {"sigmas": pipeline.sigmas(num_steps)}

    def velocity(self, model, latents, sigma, conditioning: Conditioning) -> Tensor:
        grid, guidance = self.grid(conditioning.size), conditioning.guidance

        def predict(rows: dict[str, Tensor], tokens: Tensor, time: Tensor) -> Tensor:
            text = rows["embeds"].unflatten(-1, self.transformer.text_shape)
            where = {"grid": grid, "lengths": rows["lengths"], "mask": rows.get("mask")}
            return model(hidden_states=tokens, timestep=time, text=text, **where)

        passes = self.passes(predict, latents, sigma, conditioning)
        if len(passes) == 1:
            return passes[0]
        return pipeline.within(guidance, sigma, self.combine(*passes, guidance), passes[0])

    def join(self, positive: dict[str, Tensor], negative: dict[str, Tensor]) -> dict[str, Tensor]:
        branches = positive, negative
        width = max(rows["embeds"].shape[1] for rows in branches)
        wide = [pad(r["embeds"], (0, 0, 0, width - r["embeds"].shape[1])) for r in branches]
        lengths = torch.cat([rows["lengths"] for rows in branches])
        mask = torch.arange(width, device=lengths.device) < lengths[:, None]
        return {"embeds": torch.cat(wide), "lengths": lengths, "mask": mask}

    def combine(self, conditional: Tensor, unconditional: Tensor, guidance: Guidance) -> Tensor:
        return pipeline.guided(conditional, unconditional, guidance)

    def vae_latents(self, latents: Tensor, size: Size) -> Tensor:
        return super().vae_latents(pipeline.unpatched(latents, self.grid(size)), size)

    def from_vae_latents(self, latents: Tensor, size: Size) -> Tensor:
        return pipeline.patched(super().from_vae_latents(latents, size))

    def check_size(self, size: Size) -> None:
        super().check_size(size)
        largest = self.transformer.config.max_latent_size * self.vae_scale * 2
        if max(size.height, size.width) > largest:
            raise ValueError(
                f"config.resolution={size.height}x{size.width}: Bagel's table of positions ends at "
                f"{largest} pixels. Sides of at most {largest} are needed."
            )

    @classmethod
    def sides(cls, vae: dict, transformer: dict) -> tuple[int, int] | None:
        return (PATCH, PATCH * transformer["max_latent_size"]) if transformer else None

    @classmethod
    def index(cls, file: Path) -> dict:
        return cls.stock.load_config(str(file.parent))

    @classmethod
    def transformer_config(cls, find: Callable[[str], Path | None]) -> dict:
        found = [find(name) for name in (disk.CONFIG, disk.WEIGHTS)]
        return disk.sizes(found[0].parent) if all(found) else {}

    @classmethod
    def empty_transformer(cls, config: dict) -> BagelTransformer:
        with torch.device("meta"):
            return BagelTransformer(**config)

    @classmethod
    def check_prompts(cls, prompts: list) -> None:
        for prompt in prompts:
            if prompt.images:
                raise ValueError(
                    f"the prompt {prompt.text!r} has {len(prompt.images)} reference images: Bagel "
                    f"draws from text alone here, as editing needs a context that trains. Take "
                    f'"image" out of the data set, or train a model that edits.'
                )

    @classmethod
    def check_guidance(cls, guidance: Guidance) -> None:
        ends = guidance.interval
        if len(ends) != 2 or not 0 <= ends[0] < ends[1] <= 1 or not 0 <= guidance.rescale <= 1:
            raise ValueError(
                f"{guidance}: the interval (config.sample.guidance_interval) must be two rising "
                f"numbers from 0 to 1, as (0.4, 1.0), and the rescale, the least factor, in [0, 1]."
            )
