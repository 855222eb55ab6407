"""Stable Diffusion 3, 3.5 (arXiv:2403.03206): latents (16, H/8, W/8), guidance by two passes."""

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from flow_grpo.diffusers_patch.base import JOINT_ATTENTION, PatchedPipeline
from flow_grpo.records import Cond, Conditioning, Size


class SD3(PatchedPipeline):
    stock = StableDiffusion3Pipeline
    lora_target_modules = JOINT_ATTENTION
    has_attention_backends = False
    num_clip_tokens = 77

    @torch.no_grad()
    def encode(self, prompt: str, images: tuple, max_length: int) -> Cond:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt,
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=max_length,
            device=self.device,
        )
        return Cond({"embeds": embeds[0].cpu(), "pooled": pooled[0].cpu()})

    def scheduler_arguments(self, num_steps: int, size: Size) -> dict:
        if not self.pipe.scheduler.config.get("use_dynamic_shifting"):
            return {}
        patch = self.transformer.config.patch_size * self.vae_scale
        tokens = (size.height // patch) * (size.width // patch)
        return {"mu": self.dynamic_shift(tokens, max_shift=1.16)}

    def trains(self, parameter: str) -> bool:
        """Whether it is no adapter of the last text query, which nobody reads."""
        last = self.transformer.config.num_layers - 1
        return not parameter.startswith(f"transformer_blocks.{last}.attn.add_q_proj.lora_")

    def velocity(self, model, latents, sigma, conditioning: Conditioning) -> Tensor:
        guided = self.needs_negative(conditioning.guidance)
        rows = 2 if guided else 1
        positive = conditioning["positive"]
        embeds, pooled = positive["embeds"], positive["pooled"]
        if guided:  # one batch of [negative, positive], the stock pipeline's layout
            negative = conditioning["negative"]
            embeds = torch.cat([negative["embeds"], embeds])
            pooled = torch.cat([negative["pooled"], pooled])
        velocity = model(
            hidden_states=torch.cat([latents.to(self.input_dtype)] * rows),
            timestep=torch.cat([sigma * 1000] * rows),
            encoder_hidden_states=embeds.to(self.input_dtype),
            pooled_projections=pooled.to(self.input_dtype),
            return_dict=False,
        )[0].float()
        if not guided:
            return velocity
        unconditional, conditional = velocity.chunk(2)
        return self.combine(conditional, unconditional, conditioning.guidance)
