"""Loading a checkpoint, and what is asked of it and of the data before any weight is read."""

from __future__ import annotations

import math

import torch
from diffusers import DiffusionPipeline

ENCODERS = ("text_encoder", "tokenizer", "processor", "image_encoder", "feature_extractor")


class Loading:
    """A subclass states the stock class and what it can't do."""

    stock: type[DiffusionPipeline]
    runs_in_fp16: bool = True  # False: its activations overflow
    has_attention_backends: bool = True  # False: diffusers' class always takes torch's attention
    frames_a_latent: int = 0  # of a video's later latents; 0: the model draws pictures
    num_references: tuple[int, float] = (0, math.inf)  # pictures that a prompt must and may have

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        transformer_dtype: torch.dtype | None = None,
        revision: str = "main",
        encoders: bool = True,
    ) -> Loading:
        """Load a pipeline folder or hub id: the VAE in fp32, all else in `dtype`.

        transformer_dtype: where the transformer's differs, as in a full fine-tune. encoders: False
        leaves out what only encode() needs of prompts; their files need not be there.

        Components that the folder declares absent (SD3 without its third encoder) stay absent.
        Raises ValueError if the path holds no such pipeline or it can't run in `dtype`.
        """
        if dtype == torch.float16 and not cls.runs_in_fp16:
            raise ValueError(
                f"config.mixed_precision=fp16: {cls.__name__} overflows in fp16 and gives invalid "
                f"pictures. Set config.mixed_precision=bf16."
            )
        family = cls.variant(path, revision)
        absent = {
            name: None
            for name, value in family.stock.load_config(path, revision=revision).items()
            if isinstance(value, (list, tuple))
            and (value[0] is None or not encoders and name.startswith(ENCODERS))
        }
        dtypes = {
            "default": dtype,
            "transformer": transformer_dtype or dtype,
            "vae": torch.float32,
        }
        given = (family.components(path, revision) if encoders else {}) | absent
        pipe = family.stock.from_pretrained(path, revision=revision, dtype=dtypes, **given)
        return family(pipe.to(device))

    @classmethod
    def variants(cls) -> tuple[type[Loading], ...]:
        """Return the classes of which the checkpoint decides."""
        return (cls,)

    @classmethod
    def variant(cls, path: str, revision: str) -> type[Loading]:
        """Return the class for this checkpoint. Raises ValueError if there is none."""
        try:
            index = cls.stock.load_config(path, revision=revision)
        except OSError as error:
            raise ValueError(
                f"config.pretrained.model={path!r}: no diffusers pipeline can be loaded ({error}). "
                f"A folder with a model_index.json or a reachable hub id is needed."
            ) from error
        known = {family.stock.__name__: family for family in cls.variants()}
        if (found := index["_class_name"]) not in known:
            raise ValueError(
                f"config.pretrained.model={path!r} is a {found}; this script trains a "
                f"{' or '.join(known)}. Change the model or the script."
            )
        known[found].check_index(path, index)
        return known[found]

    @classmethod
    def components(cls, path: str, revision: str) -> dict:
        """Load the parts, by name, that the stock loader is to take as they are."""
        return {}

    @classmethod
    def check_index(cls, path: str, index: dict) -> None:
        """Raise ValueError if the pipeline's model_index.json asks for what is not supported."""

    @classmethod
    def check_prompts(cls, prompts: list) -> None:
        """Raise ValueError, before weights load, if a prompt's pictures don't suit the model.

        prompts: training.prompts.Prompt, of training and evaluation.
        """
        least, most = cls.num_references
        for prompt in prompts:
            if not least <= len(prompt.images) <= most:
                needed = f"exactly {least}" if least == most else f"at least {least}"
                raise ValueError(
                    f"the prompt {prompt.text!r} has {len(prompt.images)} reference pictures; "
                    f'{cls.__name__} takes {needed}. Name them under "image" in the data set.'
                )

    @classmethod
    def check_num_frames(cls, num_frames: int) -> None:
        """Raise ValueError, before weights load, unless the model can draw so many frames."""
        step = cls.frames_a_latent
        if step and num_frames % step != 1:
            raise ValueError(
                f"config.num_frames={num_frames}: this model draws 1, {step + 1}, {2 * step + 1}, "
                f"... frames, a multiple of {step} plus one. The nearest is "
                f"{max(round((num_frames - 1) / step), 0) * step + 1}."
            )
        if not step and num_frames != 1:
            raise ValueError(
                f"config.num_frames={num_frames}: {cls.__name__} draws pictures, not videos. "
                f"Set config.num_frames=1."
            )
