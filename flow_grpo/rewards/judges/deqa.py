"""DeQA-Score (arXiv:2501.11561): how good a picture looks technically, whatever the prompt.

The model's code comes with its weights and wants an old transformers: give it an environment and a
server of its own (flow_grpo.reward_server) rather than the trainer's.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from flow_grpo.rewards.base import Reward, check_model, only_pictures
from flow_grpo.rewards.batch import Batch

BATCH_SIZE = 16


class DeQA(Reward):
    """Score 1/5 to 1: the model's mean opinion score, from 1 to 5, divided by 5."""

    @classmethod
    def check(cls, settings, prompts, metadata) -> None:
        check_model(settings, "deqa")

    def __init__(self, settings, device):
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            settings["deqa"],
            trust_remote_code=True,
            attn_implementation="eager",
            torch_dtype=torch.float16 if device.startswith("cuda") else torch.float32,
        )
        self.model = model.eval().requires_grad_(False).to(device)

    def __call__(self, batch: Batch) -> dict:
        import torch

        pictures = [Image.fromarray(image) for image in only_pictures(batch.images, "deqa")]
        scores = []
        with torch.inference_mode():
            for start in range(0, len(pictures), BATCH_SIZE):
                found = self.model.score(pictures[start : start + BATCH_SIZE])
                scores.append(found.double().cpu().numpy() / 5)
        return {"deqa": np.concatenate(scores)}
