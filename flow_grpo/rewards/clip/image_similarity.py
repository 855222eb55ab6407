"""How much an edited picture still looks like the picture that it was made from."""

from __future__ import annotations

import numpy as np

from flow_grpo.rewards.base import Reward, check_model, only_pictures
from flow_grpo.rewards.batch import Batch


class ImageSimilarity(Reward):
    """Score the cosine of CLIP ViT-L/14 with the reference picture; the mean if it has several."""

    @classmethod
    def check(cls, settings, prompts, metadata) -> None:
        check_model(settings, "clip")
        for prompt, row in zip(prompts, metadata, strict=True):
            if not row.get("image"):
                raise ValueError(
                    f"the prompt {prompt!r} has no reference picture. A data set whose rows have "
                    f'an "image" is needed.'
                )

    def __init__(self, settings, device):
        from flow_grpo.rewards.clip import encoder

        self.clip = encoder.load(settings["clip"], settings["clip"], device)

    def __call__(self, batch: Batch) -> dict:
        if batch.references is None or not all(batch.references):
            raise ValueError("image_similarity needs a reference picture for each picture.")
        features = self.clip.image_features(only_pictures(batch.images, "image_similarity"))
        counts = [len(row) for row in batch.references]
        flat = self.clip.image_features([picture for row in batch.references for picture in row])
        owners = np.repeat(np.arange(len(batch)), counts)
        cosines = (features[owners] * flat).sum(-1).double().cpu().numpy()
        return {"image_similarity": np.bincount(owners, cosines) / counts}
