"""What a model must provide: a stock pipeline, cut into what sampling and training call."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from flow_grpo.diffusers_patch.weights import ENCODERS, Weights
from flow_grpo.records import Cond, Conditioning, Guidance, Size

JOINT_ATTENTION = (  # the projections of images and text in an MMDiT block
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
)


class PatchedPipeline(Weights):
    """A model family. A subclass states the stock class and overrides what differs.

    `model` in velocity() is the transformer as accelerate wrapped it. Latents, sigmas and
    velocities are fp32; `input_dtype` is what the transformer is fed with.
    """

    unguided: Guidance = Guidance(1.0)  # means a single, conditional pass
    guides_by_two_passes: bool = True  # False: the scale is one of the transformer's inputs
    batches_guidance: bool = False  # guide() makes one pass of twice the rows instead of two
    clean_grid: bool = False  # sigmas() shifts 1, 1 - 1/N, ... 1/N
    ragged_text: bool = False  # prompts' "embeds" (L, C) differ in L
    negative_prompt: str = ""  # what guidance subtracts
    reference_area: int = 1024 * 1024  # pixels; a larger reference is shrunk to it
    enlarges_references: bool = False  # a smaller one is enlarged to it

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe
        self.transformer = pipe.transformer
        self.input_dtype = pipe.transformer.dtype
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.requires_grad_(False).eval()
        pipe.set_progress_bar_config(disable=True)

    @property
    def device(self) -> torch.device:
        return self.pipe.vae.device  # the transformer may come later, encoders may be elsewhere

    @property
    def vae_scale(self) -> int:
        """Pixels a latent, one way."""
        return self.pipe.vae_scale_factor

    def encode(self, prompt: str, images: tuple, max_length: int) -> Cond:
        """Encode a prompt without guidance or padding. images: uint8 (H, W, 3), its references."""
        raise NotImplementedError

    def negative(self, images: tuple, max_length: int) -> Cond:
        """Encode what guidance subtracts."""
        return self.encode(self.negative_prompt, images, max_length)

    def move(self, device: torch.device | str) -> None:
        self.pipe.to(device)

    def move_vae(self, device: torch.device | str) -> None:
        self.pipe.vae.to(device)

    def move_encoders(self, device: torch.device | str) -> None:
        """Bring the text encoders to a device, or to the CPU while nobody needs them."""
        for name, component in self.pipe.components.items():
            if name.startswith(ENCODERS) and isinstance(component, torch.nn.Module):
                component.to(device)

    def drop_encoders(self) -> None:
        """Forget all that only encode() needs of prompts."""
        for name in self.pipe.components:
            if name.startswith(ENCODERS):
                setattr(self.pipe, name, None)

    def cut_decoding(self, tiling: bool, slicing: bool) -> None:
        if tiling:
            self.pipe.vae.enable_tiling()
        if slicing:
            self.pipe.vae.enable_slicing()

    @classmethod
    def may_need_negative(cls, guidance: Guidance) -> bool:
        """Whether a second, unconditional pass may be made, as far as the family alone knows."""
        return cls.guides_by_two_passes and guidance.scale > cls.unguided.scale

    def needs_negative(self, guidance: Guidance) -> bool:
        return self.may_need_negative(guidance)

    def collate(self, conds: list[Cond], pad_to: int) -> dict[str, Tensor]:
        """Stack conditionings, on the device; the reference images of a call are of one size.

        pad_to: tokens, one number for the whole epoch; 0: to the call's longest. Ragged text is
        padded with zeros; its "lengths" (B,) stay on the CPU.
        """
        if self.ragged_text:
            lengths = torch.tensor([len(cond.tensors["embeds"]) for cond in conds])
            conds = [_padded(cond, pad_to or int(lengths.max())) for cond in conds]
        shapes = {tuple(tuple(t.shape) for t in cond.tensors.values()) for cond in conds}
        if len(shapes) > 1:
            raise ValueError(
                f"one call mixes reference images of several sizes ({sorted(shapes)}). Make "
                f"sample.train_batch_size a divisor of sample.num_image_per_prompt."
            )
        stacked = {
            name: torch.stack([cond.tensors[name] for cond in conds]).to(self.device)
            for name in conds[0].tensors
        }
        return stacked | {"lengths": lengths} if self.ragged_text else stacked

    def noise_shape(self, size: Size) -> tuple[int, ...]:
        """Shape of one image's Gaussian noise, as the stock pipeline draws it."""
        channels = self.pipe.vae.config.latent_channels
        return (channels, size.height // self.vae_scale, size.width // self.vae_scale)

    def initial_latents(self, size: Size, noise: Tensor) -> Tensor:
        """Bring noise (B, *noise_shape) into the transformer's layout, fp32."""
        return noise

    def sigmas(self, num_steps: int, size: Size) -> Tensor:
        """Return the stock scheduler's grid, (num_steps + 1,) fp32 on the CPU, 1 ... 0.

        With clean_grid its shift of 1, 1 - 1/N, ... 1/N.
        """
        scheduler = copy.deepcopy(self.pipe.scheduler)  # set_timesteps changes its state
        arguments = self.scheduler_arguments(num_steps, size)
        if self.clean_grid:
            arguments["sigmas"] = np.linspace(1.0, 1 / num_steps, num_steps)
        scheduler.set_timesteps(num_steps, **arguments)
        return scheduler.sigmas.clone()

    def scheduler_arguments(self, num_steps: int, size: Size) -> dict:
        """Further arguments of the scheduler's set_timesteps (sigmas, mu)."""
        return {}

    def dynamic_shift(self, num_tokens: int, max_shift: float) -> float:
        """Return mu, linear in the tokens of an image. max_shift: if the scheduler names none."""
        scheduler = self.pipe.scheduler.config
        return calculate_shift(
            num_tokens,
            scheduler.get("base_image_seq_len", 256),
            scheduler.get("max_image_seq_len", 4096),
            scheduler.get("base_shift", 0.5),
            scheduler.get("max_shift", max_shift),
        )

    def velocity(
        self, model: Callable, latents: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Predict x1 - x0 exactly as the stock loop does, (B, ...) fp32. sigma: (B,) fp32."""
        raise NotImplementedError

    def guide(
        self, predict: Callable, tokens: Tensor, time: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Guide what passes() returns."""
        passes = self.passes(predict, tokens, time, conditioning)
        return passes[0] if len(passes) == 1 else self.combine(*passes, conditioning.guidance)

    def passes(
        self, predict: Callable, tokens: Tensor, time: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, ...]:
        """Predict by two passes one after the other, or by one if `batches_guidance`.

        predict: (a branch's rows, tokens, time) -> what the transformer says; tokens come in
        `input_dtype`, and in one pass tokens and time come twice. Returns the conditional velocity
        (B, ...) fp32 and, where guidance needs it, the unconditional one.
        """

        def velocity(rows: dict[str, Tensor]) -> Tensor:
            times = len(rows["embeds"]) // len(tokens)
            inputs = (torch.cat([each] * times) for each in (tokens.to(self.input_dtype), time))
            return predict(rows, *inputs).float()

        positive = conditioning["positive"]
        if not self.needs_negative(conditioning.guidance):
            return (velocity(positive),)
        negative = conditioning["negative"]
        if self.batches_guidance:
            return velocity(self.join(positive, negative)).chunk(2)
        return velocity(positive), velocity(negative)

    def join(self, positive: dict[str, Tensor], negative: dict[str, Tensor]) -> dict[str, Tensor]:
        """Stack what guide()'s predict reads of two branches."""
        return {"embeds": torch.cat([positive["embeds"], negative["embeds"]])}

    def combine(self, conditional: Tensor, unconditional: Tensor, guidance: Guidance) -> Tensor:
        """Guide, given both velocities (B, ...) fp32."""
        return unconditional + guidance.scale * (conditional - unconditional)

    @torch.no_grad()
    def decode(self, latents: Tensor, size: Size) -> Tensor:
        """Return images (B, 3, H, W) in [0, 1], fp32; video (B, F, 3, H, W)."""
        vae = self.pipe.vae
        latents = self.vae_latents(latents, size).to(vae.dtype)
        images = vae.decode(latents, return_dict=False)[0].float()
        return (images / 2 + 0.5).clamp(0, 1)

    def vae_latents(self, latents: Tensor, size: Size) -> Tensor:
        """Return latents as the VAE decodes them: unpacked and at their own scale."""
        config = self.pipe.vae.config
        return latents / config.scaling_factor + (config.shift_factor or 0.0)

    @torch.no_grad()
    def latents(self, images: list[np.ndarray] | Tensor, size: Size) -> Tensor:
        """Encode images, B of uint8 ([F,] H, W, 3), as states: the inverse of decode().

        Returns the means of the VAE's posteriors, (B, ...) fp32, laid out as initial_latents().
        """
        pixels = torch.stack([torch.as_tensor(image) for image in images]).movedim(-1, 1)
        shape = (size.num_frames, size.height, size.width)[-(pixels.ndim - 2) :]
        assert pixels.shape[2:] == shape, f"images of {tuple(pixels.shape[2:])}, not of {size}"
        vae = self.pipe.vae
        pixels = 2.0 * (pixels.to(self.device).float() / 255) - 1.0  # the image processors' way
        mean = vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float()
        return self.from_vae_latents(mean, size)

    def from_vae_latents(self, latents: Tensor, size: Size) -> Tensor:
        """Undo vae_latents()."""
        config = self.pipe.vae.config
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor

    def stock_arguments(
        self, size: Size, guidance: Guidance, noise: Tensor, images: tuple = ()
    ) -> dict:
        """Return, beside the prompt, what makes the stock pipeline draw the same from `noise`."""
        arguments = {
            "height": size.height,
            "width": size.width,
            "guidance_scale": guidance.scale,
            "latents": noise,
        }
        if images:
            pictures = [Image.fromarray(image) for image in images]
            arguments["image"] = pictures if len(pictures) > 1 else pictures[0]
        return arguments

    def check_size(self, size: Size) -> None:
        multiple = self.vae_scale * 2
        if size.height % multiple or size.width % multiple:
            raise ValueError(
                f"config.resolution={size.height}x{size.width}: height and width must be multiples "
                f"of {multiple} for this model."
            )


def _padded(cond: Cond, pad_to: int) -> Cond:
    embeds = cond.tensors["embeds"]
    assert len(embeds) <= pad_to, f"{len(embeds)} tokens do not fit into {pad_to}"
    return Cond(cond.tensors | {"embeds": pad(embeds, (0, 0, 0, pad_to - len(embeds)))})


class VideoVAE(PatchedPipeline):
    """Its VAE takes videos, (B, C, F, h, w), and each channel has a mean and std of its own."""

    def vae_latents(self, latents: Tensor, size: Size) -> Tensor:
        mean, std = self.channel_scales(latents)
        return latents / (1.0 / std) + mean  # the stock pipelines' arithmetic

    def from_vae_latents(self, latents: Tensor, size: Size) -> Tensor:
        mean, std = self.channel_scales(latents)
        return (latents - mean) * (1.0 / std)

    def channel_scales(self, latents: Tensor) -> list[Tensor]:
        """Return each channel's mean and std, (C, 1, ...)."""
        config, shape = self.pipe.vae.config, (-1,) + (1,) * (latents.ndim - 2)
        values = (config.latents_mean, config.latents_std)
        return [latents.new_tensor(each).view(shape) for each in values]

    def decode(self, latents: Tensor, size: Size) -> Tensor:
        return super().decode(latents, size).movedim(2, 1)

    def latents(self, images: list[np.ndarray] | Tensor, size: Size) -> Tensor:
        videos = [image if image.ndim == 4 else image[None] for image in images]
        return super().latents(videos, size)
