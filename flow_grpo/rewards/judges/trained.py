"""Reward models that their authors' own packages run: EditReward, EditScore, VideoAlign.

Each wants other versions than the trainer: give it a server with an environment of its own
(scripts/reward_servers/{editreward,editscore,videoalign}.sh). They read files, so images are
written into a folder that is deleted afterwards.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from flow_grpo.rewards.base import Reward, only_images
from flow_grpo.rewards.batch import Batch


class EditReward(Reward):
    """Score an edit by EditReward (arXiv:2509.26346), higher is better; of one source image."""

    defaults: ClassVar[dict] = {"editreward_config": "", "editreward_checkpoint": ""}

    @classmethod
    def check(cls, settings, prompts, metadata) -> None:
        check_one_reference("editreward", prompts, metadata)

    def __init__(self, settings, device):
        package = _package("EditReward", "editreward")
        self.model = package.EditRewardInferencer(
            config_path=settings["editreward_config"],
            checkpoint_path=settings["editreward_checkpoint"],
            device=device,
            reward_dim="overall_detail",
            rm_head_type="ranknet_multi_head",
        )

    def __call__(self, batch: Batch) -> dict:
        import torch

        with TemporaryDirectory() as folder, torch.inference_mode():
            pairs = _saved(batch, Path(folder), "editreward")
            found = [
                self.model.reward(prompts=[prompt], image_src=[source], image_paths=[edited])[0]
                for prompt, (source, edited) in zip(batch.prompts, pairs, strict=True)
            ]
        return {"editreward": np.array([float(each.flatten()[0]) for each in found])}


class EditScore(Reward):
    """Score an edit by EditScore (arXiv:2509.23909), on its package's scale; of one source image.

    `editscore_<part>` has what its package says of PARTS; NaN where it says no number.
    """

    PARTS = ("prompt_following", "consistency", "perceptual_quality")
    defaults: ClassVar[dict] = {
        "editscore_model": "",
        "editscore_lora": "",
        "editscore_backbone": "qwen3vl",
        "editscore_passes": 1,
    }

    @classmethod
    def check(cls, settings, prompts, metadata) -> None:
        check_one_reference("editscore", prompts, metadata)

    def __init__(self, settings, device):
        lora = {"lora_path": settings["editscore_lora"]} if settings["editscore_lora"] else {}
        self.model = _package("editscore", "editscore").EditScore(
            backbone=settings["editscore_backbone"],
            model_name_or_path=settings["editscore_model"],
            score_range=25,
            num_pass=settings["editscore_passes"],
            **lora,
        )

    def __call__(self, batch: Batch) -> dict:
        edited = [Image.fromarray(image) for image in only_images(batch.images, "editscore")]
        sources = [Image.fromarray(source) for source in _sources(batch, "editscore")]
        found = [
            self.model.evaluate([source, image], prompt)
            for source, image, prompt in zip(sources, edited, batch.prompts, strict=True)
        ]
        columns = {"editscore": [each.get("overall") for each in found]}
        for part in self.PARTS:
            columns[f"editscore_{part}"] = [each.get(part) for each in found]
        return {name: np.array(values, np.float64) for name, values in columns.items()}


class VideoAlign(Reward):
    """Score a video by VideoAlign's VideoReward (arXiv:2501.13918): its normalised Overall.

    `videoalign_vq`, `_mq` and `_ta`: visual and motion quality, and alignment with the prompt.
    """

    defaults: ClassVar[dict] = {"videoalign": "", "videoalign_fps": 16.0}

    def __init__(self, settings, device):
        import torch

        self.fps = settings["videoalign_fps"]
        self.model = _package("inference", "videoalign").VideoVLMRewardInference(
            settings["videoalign"], device=device, dtype=torch.bfloat16
        )

    def __call__(self, batch: Batch) -> dict:
        import imageio
        import torch

        for video in batch.images:
            if video.ndim != 4:
                raise ValueError(f"videoalign scores videos (F, H, W, 3), and got {video.shape}.")
        with TemporaryDirectory() as folder, torch.inference_mode():
            paths = [f"{folder}/{n}.mp4" for n in range(len(batch))]
            for path, video in zip(paths, batch.images, strict=True):
                imageio.mimwrite(path, video, fps=self.fps, quality=10, macro_block_size=1)
            found = [
                self.model.reward([path], [prompt], use_norm=True)[0]
                for path, prompt in zip(paths, batch.prompts, strict=True)
            ]
        names = {"": "Overall", "_vq": "VQ", "_mq": "MQ", "_ta": "TA"}
        return {
            f"videoalign{end}": np.array([float(each[key]) for each in found])
            for end, key in names.items()
        }


def check_one_reference(name: str, prompts, metadata) -> None:
    """Raise ValueError for a row that has not one "image"."""
    for prompt, row in zip(prompts, metadata, strict=True):
        image = row.get("image")
        if not image or (isinstance(image, list) and len(image) != 1):
            raise ValueError(
                f"the prompt {prompt!r:.60} has the reference images {image!r:.60}; {name} sees "
                f"one. A data set whose rows have one is needed; the reward editing sees several."
            )


def _package(module: str, name: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(
            f"the module {module} can't be imported here ({error}). Serve it from an environment "
            f"of its own: bash scripts/reward_servers/{name}.sh, and name its URL in "
            f"config.reward_urls."
        ) from error


def _sources(batch: Batch, name: str) -> list[np.ndarray]:
    references = batch.references or [()] * len(batch)
    if any(len(each) != 1 for each in references):
        raise ValueError(f"{name} needs one reference image for each image.")
    return [source for (source,) in references]


def _saved(batch: Batch, folder: Path, name: str) -> list[tuple[str, str]]:
    """Write each row's source and edited image as PNG; return their paths."""
    edited, pairs = only_images(batch.images, name), []
    for n, images in enumerate(zip(_sources(batch, name), edited, strict=True)):
        paths = tuple(str(folder / f"{n}-{kind}.png") for kind in ("source", "edited"))
        for path, image in zip(paths, images, strict=True):
            Image.fromarray(image).save(path)
        pairs.append(paths)
    return pairs
