"""The LAION aesthetic predictor, version 2: an MLP on CLIP ViT-L/14, as DDPO (arXiv:2305.13301)."""

from __future__ import annotations

from pathlib import Path

from flow_grpo.rewards.base import Reward, check_model, only_pictures
from flow_grpo.rewards.batch import Batch


class Aesthetic(Reward):
    """Score how much people would like a picture, whatever the prompt; about 1 to 10."""

    @classmethod
    def check(cls, settings, prompts, metadata) -> None:
        check_model(settings, "clip")
        if not Path(settings["aesthetic_head"]).is_file():
            raise ValueError(
                f"config.rewards.aesthetic_head={settings['aesthetic_head']!r}: there is no such "
                f"file. That of the predictor's MLP (.pth or .safetensors) is needed, "
                f"sac+logos+ava1-l14-linearMSE.pth of LAION's improved aesthetic predictor."
            )

    def __init__(self, settings, device):
        from flow_grpo.rewards.clip import encoder, mlp

        self.clip = encoder.load(settings["clip"], settings["clip"], device)
        weights = mlp.read(settings["aesthetic_head"])
        self.head = mlp.build(weights, settings["aesthetic_head"]).to(device)
        width = self.clip.model.config.projection_dim
        if self.head[0].in_features != width:
            raise ValueError(
                f"config.rewards.aesthetic_head takes {self.head[0].in_features} features, "
                f"config.rewards.clip gives {width}: a pair that fits is needed."
            )

    def __call__(self, batch: Batch) -> dict:
        features = self.clip.image_features(only_pictures(batch.images, "aesthetic"))
        return {"aesthetic": self.head(features).squeeze(-1).double().cpu().numpy()}
