"""Reading and writing a model's weights, and what is asked of it before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor

from flow_grpo.diffusers_patch.disk import files, lora
from flow_grpo.inputs import json_object
from flow_grpo.records import Guidance

ENCODERS = ("text_encoder", "tokenizer", "processor", "image_encoder", "feature_extractor")


class Weights:
    """A subclass states the stock class, what trains of its transformer, and what it can't do."""

    stock: type[DiffusionPipeline]
    transformer: torch.nn.Module
    lora_target_modules: tuple[str, ...]
    runs_in_fp16: bool = True  # False: its activations overflow
    has_attention_backends: bool = True  # False: diffusers' class always takes torch's attention
    compiles: bool = True  # False: its blocks' inputs are of another shape from call to call
    frames_a_latent: int = 0  # of a video's later latents; 0: the model draws images
    num_references: tuple[int, float] = (0, math.inf)  # images that a prompt must and may have
    index_file: str = "model_index.json"  # by which a folder is known
    single_files: tuple[str, ...] = ()  # of weights, in a folder whose parts have no folders
    trained_part: str = ""  # of the names of all that may train
    reads_by_transformer: bool = False  # it encodes prompts, by what does not train, and is whole

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
    ) -> Weights:
        """Load a pipeline folder or hub id: the VAE in fp32, all else in `dtype`.

        transformer_dtype: where it differs. encoders: False leaves out what only encode() needs.
        Raises ValueError if the path holds no such pipeline or it can't run in `dtype`.
        """
        if dtype == torch.float16 and not cls.runs_in_fp16:
            raise ValueError(
                f"config.mixed_precision=fp16: {cls.__name__} overflows in fp16. Set it to bf16."
            )
        # torch 2.11's first choice on Hopper; its gradients are wrong where calls of one shape get
        # output gradients of different strides, as in FLUX, or a mask (pytorch issue 196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
        family = cls.variant(path, revision)
        index = family.stock.load_config(path, revision=revision)
        parts = {name: each[0] for name, each in index.items() if isinstance(each, (list, tuple))}
        absent = {
            name: None
            for name, library in parts.items()
            if library is None or not encoders and name.startswith(ENCODERS)
        }
        kind = files.variant(path, revision, set(parts) - set(absent))
        dtypes = {"default": dtype, "transformer": transformer_dtype or dtype, "vae": torch.float32}
        given = (family.components(path, revision) if encoders else {}) | absent
        pipe = family.stock.from_pretrained(
            path, revision=revision, dtype=dtypes, variant=kind, **given
        )
        return family(pipe.to(device))

    def trains(self, parameter: str) -> bool:
        """Whether the parameter of this name, the transformer's own or an adapter's, trains.

        False if the velocity does not depend on it: DDP stops where one gets no gradient.
        """
        return self.trained_part in parameter

    def add_lora(self, rank: int, alpha: float, targets: list[str]) -> None:
        """Add an adapter that changes nothing yet. PEFT draws A from torch's global generator."""
        self.transformer.add_adapter(
            LoraConfig(
                r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets
            )
        )
        for name, param in self.transformer.named_parameters():
            if "lora_" in name:
                param.data = param.data.float()

    def load_lora(self, path: str, rank: int | None = None, alpha: float | None = None) -> None:
        """Add a LoRA, to train with this rank and alpha. Raises ValueError if it does not fit."""
        lora.put(lora.read(path, self.transformer, self.stock), self.transformer, rank, alpha)

    @classmethod
    def check_lora(
        cls, path: str, config: dict, rank: int | None = None, alpha: float | None = None
    ) -> None:
        """Raise ValueError, before weights load, if a LoRA does not fit the transformer."""
        with init_empty_weights():
            transformer = cls.empty_transformer(config)
            found = lora.read(path, transformer, cls.stock)
            cls.check_targets(found.parts)
            lora.put(found, transformer, rank, alpha)

    @classmethod
    def check_targets(cls, modules: Iterable[str]) -> None:
        """Raise ValueError if one of a LoRA's modules, or of their names' ends, may not train."""
        if strays := [name for name in modules if cls.trained_part not in name]:
            raise ValueError(
                f"{strays[0]!r} would train what reads the prompts of {cls.__name__}, which is "
                f"done once: its LoRAs are of modules with {cls.trained_part!r} in their names."
            )

    @classmethod
    def transformer_config(cls, find: Callable[[str], Path | None]) -> dict:
        """Return what empty_transformer() takes, {} if it is not on this machine.

        find: a file of the model's folder by its name there.
        """
        found = find("transformer/config.json")
        return json_object(found) if found else {}

    @classmethod
    def empty_transformer(cls, config: dict) -> torch.nn.Module:
        return getattr(diffusers, config["_class_name"]).from_config(config)

    @classmethod
    def index(cls, file: Path) -> dict:
        """Return what a model_index.json says. file: of the name index_file."""
        return json_object(file)

    @classmethod
    def sides(cls, vae: dict, transformer: dict) -> tuple[int, int] | None:
        """Return of what pixels an image's sides are multiples, and the most; None: unknown yet.

        vae, transformer: their configs, {} where they are not on this machine.
        """
        if vae.get("_class_name") != "AutoencoderKL" or "patch_size" not in transformer:
            return None
        scale = 2 ** (len(vae["block_out_channels"]) - 1)  # pixels a latent
        largest = scale * transformer["patch_size"] * transformer.get("pos_embed_max_size", 10**6)
        return 2 * scale, largest

    def save_lora(self, values: dict[str, Tensor], folder: Path) -> None:
        """Write a LoRA as diffusers and PEFT load it. values: by its parameters' names."""
        lora.write(values, self.transformer, self.stock, folder)

    def load_transformer(self, folder: Path) -> None:
        """Put a saved transformer's weights in place. Raises ValueError if they do not fit."""
        kind = type(self.transformer)  # read in the widest of its weights' precisions
        dtype = max((p.dtype for p in self.transformer.parameters()), key=lambda d: d.itemsize)
        variant = files.weights(folder)[0] or None
        saved = kind.from_pretrained(folder, torch_dtype=dtype, variant=variant)
        try:
            self.transformer.load_state_dict(saved.state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"{str(folder)!r} does not fit the transformer of config.pretrained.model, which "
                f"must be its base: {error}"
            ) from None

    def save_transformer(self, values: dict[str, Tensor], folder: Path) -> None:
        """Write a transformer as diffusers loads it. values: its state, all of it."""
        with init_empty_weights():
            copy = type(self.transformer).from_config(self.transformer.config)
        copy.load_state_dict(values, assign=True)
        copy.save_pretrained(folder)

    @classmethod
    def stock_name(cls) -> str:
        """Return what model_index.json calls the stock pipeline."""
        return cls.stock.__name__

    @classmethod
    def variants(cls) -> tuple[type[Weights], ...]:
        """Return the classes of which the checkpoint decides."""
        return (cls,)

    @classmethod
    def variant(cls, path: str, revision: str) -> type[Weights]:
        """Return the class for this checkpoint. Raises ValueError if there is none."""
        try:
            index = cls.stock.load_config(path, revision=revision)
        except OSError as error:
            raise ValueError(
                f"config.pretrained.model={path!r}: no diffusers pipeline can be loaded ({error}). "
                f"A folder with {cls.index_file} or a reachable hub id is needed."
            ) from error
        known = {family.stock_name(): family for family in cls.variants()}
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
        """Raise ValueError, before weights load, if a Prompt's images don't suit the model."""
        least, most = cls.num_references
        for prompt in prompts:
            if not least <= len(prompt.images) <= most:
                needed = f"exactly {least}" if least == most else f"at least {least}"
                raise ValueError(
                    f"the prompt {prompt.text!r} has {len(prompt.images)} reference images; "
                    f'{cls.__name__} takes {needed}. Name them under "image" in the data set.'
                )

    @classmethod
    def check_guidance(cls, guidance: Guidance) -> None:
        """Raise ValueError, before weights load, if the model does not guide like this."""
        if guidance.interval != (0.0, 1.0) or guidance.rescale:
            raise ValueError(
                f"{guidance}: {cls.__name__} guides at every sigma and rescales nothing. An "
                f"interval of (0.0, 1.0), as config.sample.guidance_interval is by default, and a "
                f"rescale of 0.0 are needed."
            )

    @classmethod
    def check_num_frames(cls, num_frames: int) -> None:
        """Raise ValueError, before weights load, unless the model can draw so many frames."""
        step = cls.frames_a_latent
        if step and num_frames % step != 1:
            raise ValueError(
                f"config.num_frames={num_frames}: a multiple of {step} plus one is needed. The "
                f"nearest is {max(round((num_frames - 1) / step), 0) * step + 1}."
            )
        if not step and num_frames != 1:
            raise ValueError(
                f"config.num_frames={num_frames}: {cls.__name__} draws images. Set it to 1."
            )
