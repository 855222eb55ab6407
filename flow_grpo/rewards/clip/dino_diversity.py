"""How much the images of a prompt differ, by DINOv2's features (arXiv:2304.07193)."""

from __future__ import annotations

import numpy as np

from flow_grpo.rewards.base import Reward, check_model, only_images
from flow_grpo.rewards.batch import Batch

BATCH_SIZE = 32  # images a call


class DinoDiversity(Reward):
    """Score an image's mean cosine distance from the others of its group, 0 to 2; alone: NaN."""

    needs_groups = True

    @classmethod
    def check(cls, settings, prompts, metadata) -> None:
        check_model(settings, "dino")

    def __init__(self, settings, device):
        import torch
        from transformers import Dinov2Model
        from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

        model = Dinov2Model.from_pretrained(settings["dino"], dtype=torch.float32)
        self.model = model.eval().requires_grad_(False).to(device)
        self.prepare = BitImageProcessorPil.from_pretrained(settings["dino"])

    def __call__(self, batch: Batch) -> dict:
        features = self.features(only_images(batch.images, "dino_diversity"))
        group = np.arange(len(batch)) if batch.group is None else np.asarray(batch.group)
        same = (group[:, None] == group) & ~np.eye(len(group), dtype=bool)
        distances = np.where(same, 1 - features @ features.T, 0).sum(1)
        peers = same.sum(1)
        return {"dino_diversity": np.where(peers > 0, distances / peers.clip(min=1), np.nan)}

    def features(self, images: list[np.ndarray]) -> np.ndarray:
        """Return the class tokens, (B, D) fp64 of unit length."""
        import torch

        parts = []
        for start in range(0, len(images), BATCH_SIZE):
            batch = images[start : start + BATCH_SIZE]
            pixels = self.prepare(batch, return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                found = self.model(pixel_values=pixels.to(self.model.device)).pooler_output
            parts.append(found.double().cpu().numpy())
        whole = np.concatenate(parts)
        return whole / np.linalg.norm(whole, axis=1, keepdims=True)
