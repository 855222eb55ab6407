"""Qwen-Image (arXiv:2508.02324): packed latents (H/16 * W/16, 64), guidance that keeps its norm."""

import torch
from diffusers import QwenImagePipeline
from torch import Tensor
from torch.nn.functional import pad

from flow_grpo.diffusers_patch.base import JOINT_ATTENTION, VideoVAE
from flow_grpo.diffusers_patch.packed import Packed
from flow_grpo.records import Cond, Conditioning, Guidance, Size

UNHEARD = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp")


class QwenImage(Packed, VideoVAE):
    """Text is masked up to the epoch's common width, so a neighbour changes a row by rounding only.

    A prompt alone in its call and not padded (pad_to 0) gives the stock image to the bit.
    """

    stock = QwenImagePipeline
    lora_target_modules = (
        *JOINT_ATTENTION,
        "img_mlp.net.0.proj",
        "img_mlp.net.2",
        "txt_mlp.net.0.proj",
        "txt_mlp.net.2",
    )
    runs_in_fp16 = False
    ragged_text = True
    negative_prompt = " "

    @torch.no_grad()
    def encode(self, prompt: str, images: tuple, max_length: int) -> Cond:
        return Cond(self.text(prompt, images, max_length))

    def text(self, prompt: str, references: tuple, max_length: int) -> dict[str, Tensor]:
        """Return the tokens "embeds" (L, C) that follow the template's instructions, on the CPU."""
        embeds, _ = self.pipe.encode_prompt(
            prompt, device=self.device, max_sequence_length=max_length
        )
        return {"embeds": embeds[0].cpu()}

    def collate(self, conds: list[Cond], pad_to: int) -> dict[str, Tensor]:
        rows = super().collate(conds, pad_to)
        lengths, width = rows.pop("lengths"), rows["embeds"].shape[1]
        if lengths.min() < width:  # else without a mask, as the stock pipeline
            rows["mask"] = (torch.arange(width) < lengths[:, None]).to(self.device)
        return rows

    def noise_shape(self, size: Size) -> tuple[int, ...]:
        height, width = self.grid(size)
        return (self.transformer.config.in_channels // 4, 2 * height, 2 * width)

    def image_tokens(
        self, latents: Tensor, positive: dict[str, Tensor], size: Size
    ) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Return tokens (B, T, C), the image's first, and (1, height, width) in tokens of each."""
        return latents, [(1, *self.grid(size))]

    def velocity(self, model, latents, sigma, conditioning: Conditioning) -> Tensor:
        tokens, sizes = self.image_tokens(latents, conditioning["positive"], conditioning.size)
        time = sigma * 1000 / 1000  # as stock does in fp32; in bf16 it rounds before

        def predict(rows: dict[str, Tensor], tokens: Tensor, time: Tensor) -> Tensor:
            output = model(
                hidden_states=tokens,
                timestep=time,
                encoder_hidden_states=rows["embeds"].to(self.input_dtype),
                encoder_hidden_states_mask=rows.get("mask"),
                img_shapes=[sizes] * len(tokens),
                return_dict=False,
            )[0]
            return output[:, : latents.shape[1]]

        return self.guide(predict, tokens, time, conditioning)

    def join(self, positive: dict[str, Tensor], negative: dict[str, Tensor]) -> dict[str, Tensor]:
        both = positive["embeds"], negative["embeds"]
        width = max(embeds.shape[1] for embeds in both)
        joined = {"embeds": torch.cat([pad(e, (0, 0, 0, width - e.shape[1])) for e in both])}
        if "mask" in positive or "mask" in negative or both[0].shape[1] != both[1].shape[1]:
            ones = [torch.ones(e.shape[:2], dtype=torch.bool, device=e.device) for e in both]
            masks = positive.get("mask", ones[0]), negative.get("mask", ones[1])
            joined["mask"] = torch.cat([pad(m, (0, width - m.shape[1])) for m in masks])
        return joined

    def combine(self, conditional: Tensor, unconditional: Tensor, guidance: Guidance) -> Tensor:
        """Guide, then give each token the norm of its conditional velocity."""
        guided = super().combine(conditional, unconditional, guidance)
        wanted, found = (v.norm(dim=-1, keepdim=True) for v in (conditional, guided))
        return guided * (wanted / found.clamp(min=1e-12))

    def stock_arguments(self, size: Size, guidance: Guidance, noise, images=()) -> dict:
        latents = self.initial_latents(size, noise)
        stock = super().stock_arguments(size, guidance, latents, images)
        stock["true_cfg_scale"] = stock.pop("guidance_scale")
        if self.needs_negative(guidance):
            stock["negative_prompt"] = self.negative_prompt
        return stock

    def trains(self, parameter: str) -> bool:
        """Whether it is not among those that shape the last block's text, which nobody reads."""
        last = f"transformer_blocks.{self.transformer.config.num_layers - 1}."
        return not parameter.startswith(tuple(last + name for name in UNHEARD))

    def vae_latents(self, latents: Tensor, size: Size) -> Tensor:
        return super().vae_latents(latents, size).unsqueeze(2)

    def from_vae_latents(self, latents: Tensor, size: Size) -> Tensor:
        return super().from_vae_latents(latents.squeeze(2), size)

    def decode(self, latents: Tensor, size: Size) -> Tensor:
        return super().decode(latents, size)[:, 0]
