"""The aesthetic predictor, version 2.5 (discus0434): an MLP on SigLIP so400m, arXiv:2303.15343."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flow_grpo.rewards.base import Reward, check_model, only_images
from flow_grpo.rewards.batch import Batch

BATCH_SIZE = 16


class AestheticV25(Reward):
    """Score how much people would like an image, whatever the prompt: 1 to 10, 5.5 is good."""

    @classmethod
    def check(cls, settings, prompts, metadata) -> None:
        check_model(settings, "siglip")
        if not Path(settings["aesthetic_v2_5_head"]).is_file():
            raise ValueError(
                f"config.rewards.aesthetic_v2_5_head={settings['aesthetic_v2_5_head']!r}: there is "
                f"no such file. aesthetic_predictor_v2_5.pth of the predictor is needed."
            )

    def __init__(self, settings, device):
        import torch
        from transformers import SiglipVisionModel
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        from flow_grpo.rewards.clip import mlp

        path, head = settings["siglip"], settings["aesthetic_v2_5_head"]
        model = SiglipVisionModel.from_pretrained(path, dtype=torch.float32)
        self.model = model.eval().requires_grad_(False).to(device)
        self.prepare = SiglipImageProcessorPil.from_pretrained(path)
        weights = {k.replace("scoring_head.", "layers."): v for k, v in mlp.read(head).items()}
        self.head = mlp.build(weights, head).to(device)
        if self.head[0].in_features != model.config.hidden_size:
            raise ValueError(
                f"config.rewards.aesthetic_v2_5_head takes {self.head[0].in_features} features, "
                f"config.rewards.siglip gives {model.config.hidden_size}: a pair that fits is "
                f"needed."
            )

    def __call__(self, batch: Batch) -> dict:
        import torch
        from PIL import Image

        images = [Image.fromarray(image) for image in only_images(batch.images, "aesthetic_v2_5")]
        parts = []
        for start in range(0, len(images), BATCH_SIZE):
            pixels = self.prepare(images[start : start + BATCH_SIZE], return_tensors="pt")
            with torch.inference_mode():
                found = self.model(pixels["pixel_values"].to(self.model.device)).pooler_output
                scores = self.head(torch.nn.functional.normalize(found, dim=-1))
            parts.append(scores.squeeze(-1).double().cpu().numpy())
        return {"aesthetic_v2_5": np.concatenate(parts)}
