"""HPSv3 (arXiv:2508.03789): a Qwen2-VL tuned on how people rank pictures of one prompt.

The authors' package pins an old transformers: give it an environment and a server of its own
(scripts/reward_servers/hpsv3.sh) rather than the trainer's.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from flow_grpo.rewards.base import Reward, check_model, only_pictures
from flow_grpo.rewards.batch import Batch

BATCH_SIZE = 8


class HPSv3(Reward):
    """Score the mean of the package's normal distribution over people's preference."""

    @classmethod
    def check(cls, settings, prompts, metadata) -> None:
        if settings["hpsv3"]:  # empty: the package downloads it
            check_model(settings, "hpsv3")

    def __init__(self, settings, device):
        try:
            from hpsv3 import HPSv3RewardInferencer
        except ImportError as error:
            raise ValueError(
                f"the package hpsv3 can't be imported here ({error}). Serve it from an environment "
                f"of its own: bash scripts/reward_servers/hpsv3.sh, and name its URL in "
                f"config.reward_urls."
            ) from error
        self.model = HPSv3RewardInferencer(checkpoint_path=settings["hpsv3"] or None, device=device)

    def __call__(self, batch: Batch) -> dict:
        import torch

        pictures = [Image.fromarray(image) for image in only_pictures(batch.images, "hpsv3")]
        parts = []
        for start in range(0, len(pictures), BATCH_SIZE):
            chosen = slice(start, start + BATCH_SIZE)
            # By name: releases differ in which comes first.
            with torch.inference_mode():  # release 1.0.0 does not see to it
                found = self.model.reward(
                    image_paths=pictures[chosen], prompts=batch.prompts[chosen]
                )
            parts.append(found.double().cpu().numpy()[:, 0])  # mean, spread
        return {"hpsv3": np.concatenate(parts)}
