"""What a scorer that keeps something (a model, processes, connections) has beside its call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np


class Reward:
    """A scorer as a class; one that keeps nothing is a plain function with the same arguments.

    settings: config.rewards as a dict, with config.ocr_engine among them. Only the constructor may
    import torch or load weights, so that a mistake shows before anything slow.
    """

    needs_groups = False  # True: it compares the pictures of a group, so a call needs whole groups

    def __init__(self, settings: Mapping[str, Any], device: str):
        pass

    @classmethod
    def check(
        cls, settings: Mapping[str, Any], prompts: Sequence[str], metadata: Sequence[Mapping]
    ) -> None:
        """Raise ValueError if the settings or a prompt can't be scored; called before loading."""

    def __call__(
        self,
        images: list[np.ndarray],
        prompts: list[str],
        metadata: list[dict],
        references: list | None = None,
        group: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Score B pictures, uint8 (H, W, 3), or videos (F, H, W, 3). Returns (B,) columns."""
        raise NotImplementedError

    def close(self) -> None:
        """End what the constructor started."""


def check_model(settings: Mapping[str, Any], key: str) -> None:
    """Raise ValueError unless config.rewards.<key> is a folder, a file or could be a hub id."""
    path = settings[key]
    if not path:
        raise ValueError(f"config.rewards.{key} is empty: a local path is needed.")
    if not os.path.exists(path) and (path.startswith((".", "/")) or path.count("/") != 1):
        raise ValueError(
            f"config.rewards.{key}={path!r}: there is no such path, and it is no hub id "
            f"(owner/name). Correct it; it is relative to {os.getcwd()}."
        )


def check_package(module: str, extra: str) -> None:
    """Raise ValueError that says how to install what a reward imports."""
    if find_spec(module) is None:
        raise ValueError(
            f"the package {module} is not installed: pip install 'flow_grpo[{extra}]'."
        )


def only_pictures(images: list[np.ndarray], reward: str) -> list[np.ndarray]:
    """Return the images. Raises ValueError for a video."""
    for image in images:
        if image.ndim != 3:
            raise ValueError(f"{reward} scores pictures (H, W, 3), and got {image.shape}.")
    return images
