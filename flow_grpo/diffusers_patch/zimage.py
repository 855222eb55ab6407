"""Z-Image and Z-Image-Turbo (arXiv:2511.22699): one stream of image and text, time 1 - sigma."""

import torch
from diffusers import ZImagePipeline
from torch import Tensor

from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.records import Cond, Conditioning, Guidance, Size


class ZImage(PatchedPipeline):
    """Its scale w gives c + w (c - u), SD3's scale w + 1: 0 means none, as Turbo wants.

    The transformer takes a list of unpadded prompts; it pads and masks within, so neighbours change
    a row by rounding only. cfg_normalization and cfg_truncation stay at their defaults, off.
    """

    stock = ZImagePipeline
    lora_target_modules = (
        "attention.to_k",
        "attention.to_out.0",
        "attention.to_q",
        "attention.to_v",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
    )
    runs_in_fp16 = False
    unguided = Guidance(0.0)
    ragged_text = True

    @torch.no_grad()
    def encode(self, prompt: str, images: tuple, max_length: int) -> Cond:
        embeds, _ = self.pipe.encode_prompt(
            prompt,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_length,
        )
        return Cond({"embeds": embeds[0].cpu()})

    def scheduler_arguments(self, num_steps: int, size: Size) -> dict:
        tokens = (size.height // self.vae_scale // 2) * (size.width // self.vae_scale // 2)
        return {
            "sigmas": torch.linspace(1.0, 1 / num_steps, num_steps).tolist(),
            "mu": self.dynamic_shift(tokens, max_shift=1.15),
        }

    def velocity(self, model, latents, sigma, conditioning: Conditioning) -> Tensor:
        guided = self.needs_negative(conditioning.guidance)
        rows = [conditioning["positive"]]
        if guided:
            rows.append(conditioning["negative"])
        pictures = latents.to(self.input_dtype).repeat(len(rows), 1, 1, 1)
        output = model(
            list(pictures.unsqueeze(2).unbind(0)),  # (C, 1, h, w) each
            ((1000 - sigma * 1000) / 1000).repeat(len(rows)),
            [prompt for row in rows for prompt in self.prompts(row)],
            return_dict=False,
        )[0]
        output = -torch.stack(output).squeeze(2).float()  # it predicts x0 - x1
        if not guided:
            return output
        return self.combine(*output.chunk(2), conditioning.guidance)

    def combine(self, conditional: Tensor, unconditional: Tensor, guidance: Guidance) -> Tensor:
        return conditional + guidance.scale * (conditional - unconditional)

    def prompts(self, rows: dict[str, Tensor]) -> list[Tensor]:
        """Return each row's text (L, C) without its padding."""
        lengths = rows["lengths"].tolist()  # on the CPU: nothing waits for the device
        embeds = rows["embeds"].to(self.input_dtype)
        return [prompt[:length] for prompt, length in zip(embeds, lengths, strict=True)]
