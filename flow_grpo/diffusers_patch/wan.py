"""Wan2.1 text to video, and Wan2.2 TI2V 5B (arXiv:2503.20314): latents (16, F/4, H/8, W/8)."""

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor

from flow_grpo.diffusers_patch.base import VideoVAE
from flow_grpo.records import Cond, Conditioning, Guidance, Size


class Wan(VideoVAE):
    """Text to video, guided as the stock pipeline does.

    Released folders ship UniPC, whose steps remember earlier ones and so have no log-probability.
    FlowMatchEulerDiscreteScheduler with the folder's shift takes its place.
    """

    stock = WanPipeline
    lora_target_modules = ("to_k", "to_out.0", "to_q", "to_v")  # of self- and cross-attention
    runs_in_fp16 = False
    frames_a_latent = 4

    def __init__(self, pipe: DiffusionPipeline):
        super().__init__(pipe)
        if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
            shift = pipe.scheduler.config.flow_shift
            pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)

    @classmethod
    def check_index(cls, path: str, index: dict) -> None:
        if index.get("boundary_ratio") is not None:
            raise ValueError(
                f"config.pretrained.model={path!r} has two transformers, of which one would train. "
                f"A checkpoint with a single one is needed, Wan2.1 T2V or Wan2.2 TI2V 5B."
            )

    @property
    def vae_scale(self) -> int:
        return self.pipe.vae_scale_factor_spatial

    @torch.no_grad()
    def encode(self, prompt: str, images: tuple, max_length: int) -> Cond:
        embeds, _ = self.pipe.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=max_length,
            device=self.device,
        )
        return Cond({"embeds": embeds[0].cpu()})  # zeros up to max_length

    def noise_shape(self, size: Size) -> tuple[int, ...]:
        frames = (size.num_frames - 1) // self.frames_a_latent + 1
        height, width = size.height // self.vae_scale, size.width // self.vae_scale
        return (self.transformer.config.in_channels, frames, height, width)

    def velocity(self, model, latents, sigma, conditioning: Conditioning) -> Tensor:
        time = sigma * 1000
        if self.pipe.config.expand_timesteps:  # Wan2.2 TI2V: a time for each of the tokens
            time = time[:, None].expand(-1, latents[0, 0, :, ::2, ::2].numel())

        def predict(rows: dict[str, Tensor], latents: Tensor, time: Tensor) -> Tensor:
            embeds = rows["embeds"].to(self.input_dtype)
            inputs = {"hidden_states": latents, "timestep": time, "encoder_hidden_states": embeds}
            return model(**inputs, return_dict=False)[0]

        return self.guide(predict, latents, time, conditioning)

    def stock_arguments(self, size: Size, guidance: Guidance, noise, images=()) -> dict:
        stock = super().stock_arguments(size, guidance, noise, images)
        return stock | {"num_frames": size.num_frames}
