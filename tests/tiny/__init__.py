"""Tiny pipelines with random weights: every class is the released model's, only its sizes are not.

Nothing is downloaded. A model is one function in its family's file and one line in MODELS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from flow_grpo.conditioning import Conditioner
from flow_grpo.diffusers_patch.bagel.bagel import Bagel
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.diffusers_patch.flux import Flux
from flow_grpo.diffusers_patch.flux2_klein import Flux2Klein
from flow_grpo.diffusers_patch.flux_kontext import FluxKontext
from flow_grpo.diffusers_patch.qwenimage import QwenImage
from flow_grpo.diffusers_patch.qwenimage_edit import QwenImageEdit, QwenImageEditPlus
from flow_grpo.diffusers_patch.sd3 import SD3
from flow_grpo.diffusers_patch.wan import Wan
from flow_grpo.diffusers_patch.zimage import ZImage
from flow_grpo.records import Guidance, PromptBatch, Size
from flow_grpo.rollouts import Row
from tiny import bagel, flux, flux2, qwen, sd3, wan, zimage
from tiny.parts import LENGTH

MODELS: dict[str, tuple[type[PatchedPipeline], Callable[[], DiffusionPipeline]]] = {
    "bagel": (Bagel, bagel.bagel),
    "sd3": (SD3, sd3.sd3),
    "sd3_without_t5": (SD3, sd3.sd3_without_t5),
    "flux": (Flux, flux.flux),
    "flux_schnell": (Flux, flux.flux_schnell),
    "flux_kontext": (FluxKontext, flux.flux_kontext),
    "flux2_klein": (Flux2Klein, flux2.flux2_klein),
    "flux2_klein_edit": (Flux2Klein, flux2.flux2_klein),
    "flux2_klein_distilled": (Flux2Klein, flux2.flux2_klein_distilled),
    "qwenimage": (QwenImage, qwen.qwenimage),
    "qwenimage_edit": (QwenImageEdit, qwen.qwenimage_edit),
    "qwenimage_edit_2509": (QwenImageEditPlus, qwen.qwenimage_edit_2509),
    "qwenimage_edit_2511": (QwenImageEditPlus, qwen.qwenimage_edit_2511),
    "wan": (Wan, wan.wan),
    "wan2_2": (Wan, wan.wan2_2),
    "zimage": (ZImage, zimage.zimage),
    "zimage_turbo": (ZImage, zimage.zimage_turbo),
}
EDITS = {  # height and width of the reference images of those that are given some
    "flux_kontext": ((32, 48),),
    "flux2_klein_edit": ((64, 48), (48, 96)),
    "qwenimage_edit": ((32, 96),),  # scaled to 32 x 96
    "qwenimage_edit_2509": ((32, 96), (64, 48)),  # and to 64 x 64
    "qwenimage_edit_2511": ((32, 96), (64, 48)),
}


def patched(name: str) -> PatchedPipeline:
    family, build = MODELS[name]
    model = family(build())
    if model.enlarges_references:
        model.reference_area = 64 * 64
    return model


def save(name: str, folder: str | Path) -> Path:
    """Write a pipeline's folder, as from_pretrained reads it, and return it."""
    MODELS[name][1]().save_pretrained(folder)
    return Path(folder)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Draw noise, uint8 (height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pictures(name: str, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Draw the references that a model is given, none for most."""
    return tuple(picture(*size, seed + 10 * n) for n, size in enumerate(EDITS.get(name, ())))


def prompt_batch(
    model: PatchedPipeline,
    size: Size,
    texts: Sequence[str],
    references: Sequence[tuple],
    guidance: Guidance,
    owners: Sequence[tuple[int, int]] | None = None,
) -> PromptBatch:
    """Condition rows on their group's text and references.

    owners: (group, member) of each row; None: one row a group.
    """
    conditioner = Conditioner(model, LENGTH)
    owners = [Row(*owner) for owner in owners or [(g, 0) for g in range(len(texts))]]
    group = torch.tensor([owner.group for owner in owners])
    rows = [(text, (f"{g}.png",), references[g]) for g, text in enumerate(texts)]
    return PromptBatch(
        branches=conditioner.branches(rows, guidance),
        guidance=guidance,
        index=group,
        owners=owners,
        size=size,
        prompts=[texts[g] for g in group.tolist()],
        metadata=[{} for _ in owners],
    )
