"""DeQA-Score (arXiv:2501.11561): how good an image looks technically, whatever the prompt.

The model's code comes with its weights and wants an old transformers: give it an environment and a
server of its own (flow_grpo.reward_server) rather than the trainer's. It runs where this reward is
asked for, and nowhere else: that of a folder, or of one commit of the hub's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from flow_grpo.rewards.base import Reward, check_model, only_images
from flow_grpo.rewards.batch import Batch

BATCH_SIZE = 16
REVISIONS = ("revision", "code_revision")  # of the weights, and of the code


class DeQA(Reward):
    """Score 1/5 to 1: the model's mean opinion score, from 1 to 5, divided by 5."""

    @classmethod
    def check(cls, settings, prompts, metadata) -> None:
        check_model(settings, "deqa")
        path, commit = Path(settings["deqa"]), settings["deqa_revision"]
        if path.exists():
            _check_code(path)
        elif not re.fullmatch("[0-9a-f]{40}", commit):
            raise ValueError(
                f"config.rewards.deqa_revision={commit!r}: the code in {settings['deqa']} will "
                f"run, so the commit that you have read is needed, 40 digits from "
                f"https://huggingface.co/{settings['deqa']}/commits; or name a folder in "
                f"config.rewards.deqa."
            )

    def __init__(self, settings, device):
        import torch
        from transformers import AutoModelForCausalLM

        commit = settings["deqa_revision"]
        pinned = {} if Path(settings["deqa"]).exists() else dict.fromkeys(REVISIONS, commit)
        model = AutoModelForCausalLM.from_pretrained(
            settings["deqa"],
            trust_remote_code=True,
            **pinned,
            attn_implementation="eager",
            torch_dtype=torch.float16 if device.startswith("cuda") else torch.float32,
        )
        self.model = model.eval().requires_grad_(False).to(device)

    def __call__(self, batch: Batch) -> dict:
        import torch

        pictures = [Image.fromarray(image) for image in only_images(batch.images, "deqa")]
        scores = []
        with torch.inference_mode():
            for start in range(0, len(pictures), BATCH_SIZE):
                found = self.model.score(pictures[start : start + BATCH_SIZE])
                scores.append(found.double().cpu().numpy() / 5)
        return {"deqa": np.concatenate(scores)}


def _check_code(folder: Path) -> None:
    """Raise ValueError if a folder's code is another repository's, of whatever is there today."""
    config = folder / "config.json"
    try:
        named = json.loads(config.read_text()).get("auto_map", {}) if config.is_file() else {}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{config} can't be read ({error}).") from None
    if "--" in json.dumps(named):
        raise ValueError(
            f"{config}: auto_map names the code of another repository, {named}. Put that code into "
            f"the folder, and name its file without owner--repository."
        )
