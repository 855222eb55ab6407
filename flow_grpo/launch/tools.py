"""What scripts share that draw with a checkpoint outside a run: options, loading, what is drawn."""

from __future__ import annotations

import argparse
import os
import re
from typing import NamedTuple

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from ml_collections import ConfigDict
from transformers.utils import logging as transformers_logging

from flow_grpo import inputs
from flow_grpo.cli import user_path
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.diffusers_patch.registry import FAMILIES
from flow_grpo.evaluation.comparison import Task
from flow_grpo.launch import encoders, model_files
from flow_grpo.records import Guidance, Size

OPTIONS = dict.fromkeys(("height", "width", "resolution"), "size") | {
    "pretrained.model": "model",
    "pretrained.revision": "revision",
    "mixed_precision": "dtype",
    "num_frames": "num_frames",
    "max_sequence_length": "max_sequence_length",
}
PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class Loaded(NamedTuple):
    family: type[PatchedPipeline]
    pipeline: PatchedPipeline
    task: Task


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what load() reads, but for the prompts."""
    scripts = sorted({_script(family) for family in FAMILIES.values()})
    parser.add_argument(
        "--model", type=os.path.expanduser, required=True, help="a pipeline's folder or hub id"
    )
    parser.add_argument("--revision", default="main")
    parser.add_argument("--script", choices=scripts, help="default: by the model's own class")
    parser.add_argument("--dtype", choices=tuple(PRECISION), default="fp32")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--size", default="512", help="pixels: 512, or HEIGHTxWIDTH")
    parser.add_argument("--num_frames", type=int, default=1, help="of a video")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--max_sequence_length", type=int, default=128, help="tokens")
    parser.add_argument(
        "--reference",
        action="append",
        type=user_path,
        help="an editing model's image; may repeat; default: a drawn one",
    )


def load(args: argparse.Namespace, prompts: tuple[str, ...], config: ConfigDict) -> Loaded:
    """Check the options, write them into the config, and load the model. Raises ValueError."""
    try:
        return _load(args, prompts, config)
    except ValueError as error:
        named = re.sub(r"(--)?config\.([a-z._]*[a-z])", _option, str(error))
        raise ValueError(named) from error


def _option(key: re.Match) -> str:
    """Write a config's key as the option that sets it here."""
    return f"--{OPTIONS[key[2]]}" if key[2] in OPTIONS else key[0]


def _load(args: argparse.Namespace, prompts: tuple[str, ...], config: ConfigDict) -> Loaded:
    family = _settle(args, config)
    for each in (diffusers_logging, transformers_logging):
        each.set_verbosity_error()
    dtype = encoders.DTYPES[config.mixed_precision]
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = family.variant(args.model, args.revision)
    chosen.check_num_frames(args.num_frames)
    pipeline = chosen.from_pretrained(
        args.model, dtype=dtype, device=device, revision=args.revision
    )
    return Loaded(family, pipeline, _task(args, prompts, config, pipeline))


def _script(family: type[PatchedPipeline]) -> str:
    """Return the name of a family's script, less "train_"."""
    return family.__module__.rpartition(".")[2]


def _settle(args: argparse.Namespace, config: ConfigDict) -> type[PatchedPipeline]:
    """Write the options into the config; return the model's family."""
    config.pretrained.model, config.pretrained.revision = args.model, args.revision
    config.mixed_precision = PRECISION[args.dtype]
    height, _, width = args.size.partition("x")
    try:
        config.height, config.width = int(height), int(width or height)
    except ValueError:
        raise ValueError(f"--size={args.size}: 512 or 512x768 is needed.") from None
    config.num_frames, config.max_sequence_length = args.num_frames, args.max_sequence_length
    if args.steps < 2:
        raise ValueError(f"--steps={args.steps}: at least 2 are needed, the last has no noise.")
    for path in args.reference or ():
        if not path.is_file():
            raise ValueError(f"--reference={path}: there is no such file.")
        inputs.size(path)
    model_files.check(config)
    family = model_files.family(config)
    if args.script and args.script != _script(family):
        raise ValueError(
            f"--script={args.script}: {args.model} is for {_script(family)}. Leave --script out, "
            f"or change the model."
        )
    return family


def _task(
    args: argparse.Namespace,
    prompts: tuple[str, ...],
    config: ConfigDict,
    pipeline: PatchedPipeline,
) -> Task:
    size = Size(config.height, config.width, config.num_frames)
    pipeline.check_size(size)
    images = tuple(map(inputs.picture, args.reference or ()))
    if not images and pipeline.num_references[0]:
        rows, columns = np.mgrid[0 : size.height, 0 : size.width]
        waves = [np.sin(rows / 9 + n) + np.cos(columns / (11 + n)) for n in range(3)]
        images = (((np.stack(waves, axis=-1) + 2) * 63).astype(np.uint8),)
    guidance = Guidance(args.guidance)
    return Task(prompts, images, size, args.steps, guidance, args.max_sequence_length)
