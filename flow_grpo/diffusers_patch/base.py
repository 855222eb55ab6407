"""What a model must provide: a stock pipeline, cut into encode, sigmas, velocity and decode."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from flow_grpo.rollout import Cond, Size

JOINT_ATTENTION = (  # the projections of pictures and text in an MMDiT block
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
)


class PatchedPipeline:
    """A model family. A subclass states the stock class and overrides what differs.

    `model` in velocity() is the transformer as accelerate wrapped it: sampling and training call
    the same object. Latents, sigmas and velocities are fp32; `input_dtype` is what the transformer
    is fed with.
    """

    stock: type[DiffusionPipeline]
    lora_target_modules: tuple[str, ...]
    runs_in_fp16: bool = True  # False: its activations overflow

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe
        self.transformer = pipe.transformer
        self.input_dtype = pipe.transformer.dtype
        self.vae_scale = pipe.vae_scale_factor  # pixels a latent, one way
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.requires_grad_(False).eval()
        pipe.set_progress_bar_config(disable=True)

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        transformer_dtype: torch.dtype | None = None,
        revision: str = "main",
    ) -> PatchedPipeline:
        """Load a pipeline folder or hub id: the VAE in fp32, all else in `dtype`.

        transformer_dtype: where the transformer's differs, as in a full fine-tune.

        Components that the folder declares absent (SD3 without its third encoder) stay absent.
        Raises ValueError if the path holds no such pipeline or it can't run in `dtype`.
        """
        if dtype == torch.float16 and not cls.runs_in_fp16:
            raise ValueError(
                f"config.mixed_precision=fp16: {cls.__name__} overflows in fp16 and gives invalid "
                f"pictures. Set config.mixed_precision=bf16."
            )
        try:
            config = cls.stock.load_config(path, revision=revision)
        except OSError as error:
            raise ValueError(
                f"config.pretrained.model={path!r}: no diffusers pipeline can be loaded ({error}). "
                f"A folder with a model_index.json or a reachable hub id is needed."
            ) from error
        if config["_class_name"] != cls.stock.__name__:
            raise ValueError(
                f"config.pretrained.model={path!r} is a {config['_class_name']}; this script "
                f"trains a {cls.stock.__name__}. Change the model or the script."
            )
        absent = {
            name: None
            for name, value in config.items()
            if isinstance(value, (list, tuple)) and value[0] is None
        }
        dtypes = {
            "default": dtype,
            "transformer": transformer_dtype or dtype,
            "vae": torch.float32,
        }
        pipe = cls.stock.from_pretrained(path, revision=revision, dtype=dtypes, **absent)
        return cls(pipe.to(device))

    @classmethod
    def check_prompts(cls, prompts: list) -> None:
        """Raise ValueError, before weights load, if a prompt's pictures don't suit the model.

        prompts: training.prompts.Prompt, of training and evaluation.
        """

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    def encode(self, prompts: list[str], images: list[tuple], max_length: int) -> list[Cond]:
        """Encode rows of (prompt, reference images) in one call, without guidance or padding.

        images: a tuple of uint8 (H, W, 3) arrays a row, empty where the model takes none.
        """
        raise NotImplementedError

    def negative(self, images: tuple, max_length: int) -> Cond:
        """Encode what guidance subtracts, the empty prompt unless the model says otherwise."""
        return self.encode([""], [images], max_length)[0]

    def needs_negative(self, guidance_scale: float) -> bool:
        """Whether a second, unconditional pass is made at this scale."""
        return guidance_scale > 1

    def collate(self, conds: list[Cond], pad_to: int) -> dict[str, Tensor]:
        """Stack conditionings, on the device. pad_to: tokens, one number for the whole epoch.

        Raises ValueError where the reference images of one call differ in size.
        """
        shapes = {tuple(tuple(t.shape) for t in cond.tensors.values()) for cond in conds}
        if len(shapes) > 1:
            raise ValueError(
                f"one call mixes conditionings of shapes {sorted(shapes)}. Prompts whose reference "
                f"images differ in size must not share a call: make sample.train_batch_size a "
                f"divisor of sample.num_image_per_prompt."
            )
        return {
            name: torch.stack([cond.tensors[name] for cond in conds]).to(self.device)
            for name in conds[0].tensors
        }

    def noise_shape(self, size: Size) -> tuple[int, ...]:
        """Shape of one picture's Gaussian noise, as the stock pipeline draws it."""
        channels = self.pipe.vae.config.latent_channels
        return (channels, size.height // self.vae_scale, size.width // self.vae_scale)

    def initial_latents(self, size: Size, noise: Tensor) -> Tensor:
        """Bring noise (B, *noise_shape) into the transformer's layout, fp32."""
        return noise

    def sigmas(self, num_steps: int, size: Size) -> Tensor:
        """Return the stock scheduler's grid, (num_steps + 1,) fp32 on the CPU, 1 ... 0."""
        scheduler = copy.deepcopy(self.pipe.scheduler)  # set_timesteps changes its state
        scheduler.set_timesteps(num_steps, **self.schedule(num_steps, size))
        return scheduler.sigmas.clone()

    def schedule(self, num_steps: int, size: Size) -> dict:
        """Further arguments of the scheduler's set_timesteps (sigmas, mu)."""
        return {}

    def dynamic_shift(self, num_tokens: int, max_shift: float) -> float:
        """Return mu, linear in the tokens of a picture. max_shift: if the scheduler names none."""
        scheduler = self.pipe.scheduler.config
        return calculate_shift(
            num_tokens,
            scheduler.get("base_image_seq_len", 256),
            scheduler.get("max_image_seq_len", 4096),
            scheduler.get("base_shift", 0.5),
            scheduler.get("max_shift", max_shift),
        )

    def velocity(
        self,
        model: Callable,
        latents: Tensor,
        sigma: Tensor,
        cond: dict[str, Tensor],
        negative: dict[str, Tensor] | None,
        guidance_scale: float,
        size: Size,
    ) -> Tensor:
        """Predict x1 - x0 with guidance, exactly as the stock pipeline's denoising loop does.

        latents: (B, ...) fp32. sigma: (B,) fp32. cond, negative: rows of collate().
        Returns (B, ...) fp32.
        """
        raise NotImplementedError

    @torch.no_grad()
    def decode(self, latents: Tensor, size: Size) -> Tensor:
        """Return pictures (B, 3, H, W) in [0, 1], fp32; video (B, F, 3, H, W)."""
        vae = self.pipe.vae
        latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        images = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
        return (images / 2 + 0.5).clamp(0, 1)

    def check_size(self, size: Size) -> None:
        """Raise ValueError unless the transformer can produce this size."""
        multiple = self.vae_scale * 2
        if size.height % multiple or size.width % multiple:
            raise ValueError(
                f"config.resolution={size.height}x{size.width}: height and width must be multiples "
                f"of {multiple} for this model."
            )
