"""PickScore (arXiv:2305.01569): a CLIP ViT-H/14 tuned on what people prefer among two pictures."""

from __future__ import annotations

from flow_grpo.rewards.base import Reward, check_model, only_pictures
from flow_grpo.rewards.batch import Batch


class PickScore(Reward):
    """Score exp(logit scale) x cosine(picture, prompt) / 26; about 0.75 to 0.9."""

    @classmethod
    def check(cls, settings, prompts, metadata) -> None:
        check_model(settings, "pickscore")
        check_model(settings, "pickscore_processor")

    def __init__(self, settings, device):
        from flow_grpo.rewards.clip import encoder

        self.clip = encoder.load(settings["pickscore"], settings["pickscore_processor"], device)

    def __call__(self, batch: Batch) -> dict:
        cosines = self.clip.cosines(only_pictures(batch.images, "pickscore"), batch.prompts)
        return {"pickscore": self.clip.scale * cosines / 26}
