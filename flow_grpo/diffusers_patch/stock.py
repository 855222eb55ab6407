"""The stock pipeline that a model was cut from: called as its users call it, and watched."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoModel, DiffusionPipeline
from torch import Tensor, nn

from flow_grpo.diffusers_patch.bagel.pipeline import BagelPipeline
from flow_grpo.diffusers_patch.bagel.transformer import BagelTransformer
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.records import Guidance, Size


def call(
    pipeline: PatchedPipeline,
    size: Size,
    guidance: Guidance,
    noise: Tensor,
    images: tuple,
    num_steps: int,
    max_length: int,
    decode: bool = True,
    **given,
) -> tuple[list[Tensor], list[np.ndarray]]:
    """Call the stock pipeline on `noise`; return the latents after each step, and images."""
    seen: list[Tensor] = []
    arguments = pipeline.stock_arguments(size, guidance, noise, images)
    if "prompt_embeds" in given:
        arguments.pop("negative_prompt", None)  # it comes as embeddings too
    pictures = pipeline.pipe(
        num_inference_steps=num_steps,
        max_sequence_length=max_length,
        callback_on_step_end=lambda pipe, step, time, now: seen.append(now["latents"]) or {},
        output_type="pil" if decode else "latent",
        return_dict=False,
        **(arguments | given),
    )[0]
    return seen, [np.asarray(picture) for picture in pictures] if decode else []


def load(path: str, dtype: torch.dtype, transformer: str | None = None) -> DiffusionPipeline:
    """Load a pipeline as its users do. transformer: a folder of what takes its own's place.

    Raises OSError if the folder or hub id is none.
    """
    loader, kind = DiffusionPipeline, AutoModel
    if not (Path(path) / DiffusionPipeline.config_name).is_file():
        with suppress(OSError):  # it is of diffusers, or nowhere
            BagelPipeline.load_config(path)
            loader, kind = BagelPipeline, BagelTransformer
    given = {}
    if transformer:
        given["transformer"] = kind.from_pretrained(transformer, torch_dtype=dtype)
    return loader.from_pretrained(path, dtype=dtype, **given)


def last_sigmas(pipeline: PatchedPipeline) -> Tensor:
    return pipeline.pipe.scheduler.sigmas.cpu()


@contextmanager
def timesteps(transformer: nn.Module) -> Iterator[list]:
    """List what the transformer is told of the time: outputs can hide a wrong last bit."""
    seen = []

    def note(module: nn.Module, args: tuple, inputs: dict) -> None:
        told = args[1] if args else inputs["timestep"]
        seen.append(told.float().tolist())

    with transformer.register_forward_pre_hook(note, with_kwargs=True):
        yield seen


@contextmanager
def told(transformer: nn.Module, times: list) -> Iterator[None]:
    """Tell the transformer these times, as timesteps() lists them, whatever it is called with."""
    left = iter(times)

    def replace(module: nn.Module, args: tuple, inputs: dict) -> tuple[tuple, dict]:
        given = args[1] if args else inputs["timestep"]
        time = torch.tensor(next(left), dtype=given.dtype, device=given.device)
        time = time.reshape(given.shape)
        return ((args[0], time, *args[2:]), inputs) if args else (args, inputs | {"timestep": time})

    with transformer.register_forward_pre_hook(replace, with_kwargs=True):
        yield


@contextmanager
def vae_in_place(pipeline: PatchedPipeline) -> Iterator[None]:
    """Put a VAE in place as the stock pipeline needs it, of the transformer's precision."""
    own = pipeline.pipe.vae
    if own.dtype != pipeline.input_dtype:
        pipeline.pipe.vae = copy.deepcopy(own).to(pipeline.input_dtype)
    try:
        yield
    finally:
        pipeline.pipe.vae = own


@contextmanager
def exported_lora(
    pipeline: PatchedPipeline, values: dict[str, Tensor], folder: Path
) -> Iterator[None]:
    """Let the stock pipeline load the adapter that trains; afterwards there is none."""
    pipeline.save_lora(values, folder)
    pipeline.transformer.delete_adapters("default")
    pipeline.pipe.load_lora_weights(folder)
    try:
        yield
    finally:
        pipeline.pipe.unload_lora_weights()
