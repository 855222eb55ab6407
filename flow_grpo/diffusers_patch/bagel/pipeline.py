"""A pipeline of BAGEL as diffusers has them: diffusers and transformers have none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders.lora_pipeline import CogView4LoraLoaderMixin
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import hf_hub_download
from torch import Tensor
from transformers import Qwen2Tokenizer

from flow_grpo.diffusers_patch.bagel import folder as disk
from flow_grpo.diffusers_patch.bagel.transformer import BagelTransformer
from flow_grpo.records import Guidance

SHIFT = 3.0


class BagelPipeline(DiffusionPipeline, CogView4LoraLoaderMixin):
    """Draws from text. The mixin is any that loads a LoRA of a transformer alone."""

    def __init__(
        self,
        transformer: BagelTransformer,
        vae: AutoencoderKL,
        tokenizer: Qwen2Tokenizer,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, tokenizer=tokenizer, scheduler=scheduler
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=2 * self.vae_scale_factor)

    @classmethod
    def load_config(cls, path: str, revision: str = "main", **_: object) -> dict:
        """Return what a model_index.json would say. Raises OSError if this is no such folder."""
        if not Path(path).is_dir():
            try:
                hf_hub_download(path, disk.CONFIG, revision=revision)
            except ValueError as error:  # no name that the hub could have
                raise OSError(f"{path} is no folder and no hub id") from error
        elif not (Path(path) / disk.CONFIG).is_file():
            raise OSError(f"{path} has no {disk.CONFIG}")
        return {"_class_name": cls.__name__, "transformer": ["flow_grpo", "BagelTransformer"]}

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        revision: str = "main",
        dtype: torch.dtype | dict[str, torch.dtype] = torch.float32,
        variant: str | None = None,
        transformer: BagelTransformer | None = None,
    ) -> BagelPipeline:
        """Read the released folder. dtype: one, or by "default", "transformer" and "vae".

        Of the transformer its dtype is that of the generation expert, "default" all else's. It is
        not read if it is given. Raises ValueError if the folder's files do not belong together.
        """
        kinds = dtype if isinstance(dtype, dict) else {"default": dtype}
        usual, folder = kinds["default"], disk.find(path, revision)
        tokenizer = disk.read_tokenizer(folder)
        if transformer is None:
            kind = kinds.get("transformer", usual)
            transformer = disk.read_transformer(folder, tokenizer, usual, kind)
        vae = disk.read_vae(folder, kinds.get("vae", usual))
        return cls(transformer, vae, tokenizer, FlowMatchEulerDiscreteScheduler(shift=SHIFT))

    def save_pretrained(self, folder: str | Path, **_: object) -> None:
        """Write a folder of the released layout."""
        disk.write(Path(folder), self.transformer, self.vae, self.tokenizer)

    def text(self, prompt: str, max_sequence_length: int) -> Tensor:
        """Return a prompt's keys and values, (L, ...); its end is cut, its two marks count."""
        start, end = disk.mark_ids(self.tokenizer, "im")
        words = self.tokenizer.encode(prompt, add_special_tokens=False)
        ids = [start, *words[: max(max_sequence_length - 2, 0)], end]
        return self.transformer.prefill(torch.tensor(ids, device=self.transformer.device))

    def no_text(self) -> Tensor:
        """What guidance subtracts has no text at all, not an empty one: (0, ...)."""
        return torch.zeros(0, *self.transformer.text_shape, dtype=self.transformer.dtype)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 49,
        guidance_scale: float = 4.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        max_sequence_length: int = 512,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
    ) -> tuple | dict:
        """Draw one picture.

        num_inference_steps: one less than the authors' num_timesteps, which counts both ends.
        guidance_interval, guidance_rescale: their cfg_interval and cfg_renorm_min; their
        cfg_renorm_type is "global", their cfg_img_scale 1. latents: the noise, (1, n, patch_dim)
        fp32. output_type: pil | np | pt | latent. Returns the images, as {"images"} or a 1-tuple.
        """
        device, patch = self.transformer.device, 2 * self.vae_scale_factor
        grid = (height // patch, width // patch)
        if latents is None:
            shape = (1, grid[0] * grid[1], self.transformer.config.patch_dim)
            latents = randn_tensor(shape, generator, device, torch.float32)
        guidance = Guidance(guidance_scale, tuple(guidance_interval), guidance_rescale)
        texts = [self.text(prompt, max_sequence_length)]
        texts += [self.no_text()] if guidance_scale > 1 else []
        self.scheduler.set_timesteps(sigmas=sigmas(num_inference_steps), device=device)
        for i, time in enumerate(self.progress_bar(self.scheduler.timesteps)):
            sigma = self.scheduler.sigmas[i : i + 1].to(device)
            passes = [
                self.transformer(
                    hidden_states=latents.to(self.transformer.dtype),
                    timestep=sigma,
                    grid=grid,
                    text=text[None].to(device),
                    lengths=torch.tensor([len(text)], device=device),
                ).float()
                for text in texts
            ]
            velocity = passes[0]
            if len(passes) == 2:
                velocity = within(guidance, sigma, guided(*passes, guidance), velocity)
            latents = self.scheduler.step(velocity, time, latents, return_dict=False)[0]
            if callback_on_step_end:
                callback_on_step_end(self, i, time, {"latents": latents})
        images = latents
        if output_type != "latent":
            vae = self.vae
            states = unpatched(latents, grid) / vae.config.scaling_factor + vae.config.shift_factor
            images = vae.decode(states.to(vae.dtype), return_dict=False)[0]
            images = self.image_processor.postprocess(images.float(), output_type=output_type)
        return {"images": images} if return_dict else (images,)


def sigmas(num_steps: int) -> list[float]:
    """Return 1 ... 1 / N, which the scheduler shifts and ends with 0; as torch rounds them."""
    return torch.linspace(1, 0, num_steps + 1)[:-1].tolist()


def guided(conditional: Tensor, unconditional: Tensor, guidance: Guidance) -> Tensor:
    """Guide velocities (B, n, C) fp32; no picture's norm may grow beyond the conditional one's.

    The factor is at least guidance.rescale, so that 1 leaves the norm as it is.
    """
    found = unconditional + guidance.scale * (conditional - unconditional)
    wanted, norm = (each.norm(dim=(1, 2), keepdim=True) for each in (conditional, found))
    return found * (wanted / (norm + 1e-8)).clamp(guidance.rescale, 1.0)


def within(guidance: Guidance, sigma: Tensor, guided: Tensor, conditional: Tensor) -> Tensor:
    """Take the guided velocity where sigma (B,) lies in the guidance's interval (low, high]."""
    low, high = guidance.interval
    return torch.where(((low < sigma) & (sigma <= high))[:, None, None], guided, conditional)


def patched(latents: Tensor) -> Tensor:
    """Turn (B, C, 2h, 2w) into tokens (B, h w, 4 C): row and column in the patch, then channel."""
    cells = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, h, 2, w, 2)
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatched(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Undo patched(). grid: rows and columns of tokens."""
    cells = tokens.unflatten(2, (2, 2, -1)).unflatten(1, grid)  # (B, h, w, 2, 2, C)
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3).contiguous()
