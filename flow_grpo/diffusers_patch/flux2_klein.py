"""FLUX.2 klein: text to image and editing; a token is 2 x 2 latents, (H/16 * W/16, 128)."""

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from flow_grpo.diffusers_patch.base import JOINT_ATTENTION
from flow_grpo.diffusers_patch.flux import position_ids
from flow_grpo.diffusers_patch.packed import Packed, pack, references_of, unpack
from flow_grpo.records import Cond, Conditioning, Guidance, Size

MIN_SIDE, MAX_ASPECT = 64, 8  # of a reference image, as the stock pipeline checks
REFERENCE_TIME = 10  # reference i lies at time 10 (i + 1), the image that is denoised at 0


class Flux2Klein(Packed):
    """Any number of reference images a row. Distilled checkpoints ignore guidance."""

    stock = Flux2KleinPipeline
    lora_target_modules = (
        *JOINT_ATTENTION,
        "attn.to_qkv_mlp_proj",
        "ff.linear_in",
        "ff.linear_out",
        "ff_context.linear_in",
        "ff_context.linear_out",
    )
    runs_in_fp16 = False

    @classmethod
    def check_prompts(cls, prompts: list) -> None:
        for prompt in prompts:
            for path, (width, height) in zip(prompt.images, prompt.image_sizes, strict=True):
                short, long = sorted((width, height))
                if short < MIN_SIDE or long > MAX_ASPECT * short:
                    raise ValueError(
                        f"the reference image {path!r} of the prompt {prompt.text!r} has "
                        f"{width} x {height} pixels; FLUX.2 klein takes sides of at least "
                        f"{MIN_SIDE} whose ratio is at most {MAX_ASPECT}. Replace the image."
                    )

    @torch.no_grad()
    def encode(self, prompt: str, images: tuple, max_length: int) -> Cond:
        embeds, _ = self.pipe.encode_prompt(
            prompt, device=self.device, max_sequence_length=max_length
        )
        return self.with_references(Cond({"embeds": embeds[0].cpu()}), images)

    def negative(self, images: tuple, max_length: int) -> Cond:
        return super().negative((), max_length)  # both passes see the positive branch's references

    def needs_negative(self, guidance: Guidance) -> bool:
        return super().needs_negative(guidance) and not self.pipe.config.is_distilled

    def reference_latents(self, image: np.ndarray) -> Tensor:
        """Encode an image, uint8 (H, W, 3), to latents (4 C, H/16, W/16), fp32.

        Shrunk to reference_area pixels if it is larger, cut around its middle to multiples of 16.
        """
        processor, multiple = self.pipe.image_processor, self.vae_scale * 2
        picture = processor._resize_if_exceeds_area(Image.fromarray(image), self.reference_area)
        width, height = (side // multiple * multiple for side in picture.size)
        pixels = processor.preprocess(picture, height=height, width=width, resize_mode="crop")
        pixels = pixels.to(self.device, self.pipe.vae.dtype)
        return self.pipe._encode_vae_image(pixels, generator=None)[0].float()

    def noise_shape(self, size: Size) -> tuple[int, ...]:
        return (self.transformer.config.in_channels, *self.grid(size))

    def initial_latents(self, size: Size, noise: Tensor) -> Tensor:
        return noise.flatten(2).transpose(1, 2).contiguous()

    def scheduler_arguments(self, num_steps: int, size: Size) -> dict:
        height, width = self.grid(size)
        mu = compute_empirical_mu(height * width, num_steps)
        return {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps), "mu": mu}

    def velocity(self, model, latents, sigma, conditioning: Conditioning) -> Tensor:
        device, positive = latents.device, conditioning["positive"]
        references = references_of(positive)
        tokens = torch.cat([latents, *(r.flatten(2).transpose(1, 2) for r in references)], dim=1)
        places = [position_ids(0, *self.grid(conditioning.size), device)]
        for number, reference in enumerate(references, start=1):
            places.append(position_ids(REFERENCE_TIME * number, *reference.shape[2:], device))
        places = pad(torch.cat(places), (0, 1))  # (T, 4): time, row, column, word
        words = torch.arange(positive["embeds"].shape[1], device=device)
        time = sigma * 1000 / 1000  # as stock does in fp32; in bf16 it rounds before

        def predict(rows: dict[str, Tensor], tokens: Tensor, time: Tensor) -> Tensor:
            output = model(
                hidden_states=tokens,
                timestep=time,
                guidance=None,
                encoder_hidden_states=rows["embeds"].to(self.input_dtype),
                txt_ids=pad(words[:, None], (3, 0)),
                img_ids=places,
                return_dict=False,
            )[0]
            return output[:, : latents.shape[1]]

        return self.guide(predict, tokens, time, conditioning)

    def vae_latents(self, latents: Tensor, size: Size) -> Tensor:
        mean, std = self.token_mean_and_std()
        return unpack(latents * std + mean, *self.grid(size))

    def from_vae_latents(self, latents: Tensor, size: Size) -> Tensor:
        mean, std = self.token_mean_and_std()
        return (pack(latents) - mean) / std

    def token_mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Return what each of a token's 4 C numbers is normalised by, (4 C,)."""
        vae = self.pipe.vae
        return vae.bn.running_mean, torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
