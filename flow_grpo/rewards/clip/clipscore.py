"""CLIPScore (arXiv:2104.08718): how well a picture fits its prompt, as CLIP ViT-L/14 sees it."""

from __future__ import annotations

from flow_grpo.rewards.base import Reward, check_model, only_pictures
from flow_grpo.rewards.batch import Batch


class ClipScore(Reward):
    """Score exp(logit scale) x cosine(picture, prompt) / 30; about 0.5 to 1.3.

    The scale is Flow-GRPO's; the paper's own is 2.5 x max(cosine, 0).
    """

    @classmethod
    def check(cls, settings, prompts, metadata) -> None:
        check_model(settings, "clip")

    def __init__(self, settings, device):
        from flow_grpo.rewards.clip import encoder

        self.clip = encoder.load(settings["clip"], settings["clip"], device)

    def __call__(self, batch: Batch) -> dict:
        cosines = self.clip.cosines(only_pictures(batch.images, "clipscore"), batch.prompts)
        return {"clipscore": self.clip.scale * cosines / 30}
