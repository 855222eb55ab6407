"""CLIP (arXiv:2103.00020) as a measure of likeness; shared by the rewards that are built on it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from threading import Lock

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

BATCH_SIZE = 32  # pictures or texts a call


class Clip:
    """A frozen CLIP in fp32. Pictures are prepared by PIL, whether torchvision is there or not."""

    def __init__(self, model: CLIPModel, processor_path: str, device: str):
        self.model = model.eval().requires_grad_(False).to(device)
        self.prepare = CLIPImageProcessorPil.from_pretrained(processor_path)
        self.tokenizer = CLIPTokenizer.from_pretrained(processor_path)
        self._tokenizing = Lock()  # rewards that share a CLIP have threads of their own
        self.max_length = model.config.text_config.max_position_embeddings
        self.scale = float(model.logit_scale.exp())

    @torch.inference_mode()
    def image_features(self, images: Sequence[np.ndarray | Image.Image]) -> Tensor:
        """Embed pictures, uint8 (H, W, 3) of any sizes. Returns (B, D) of unit length."""
        parts = []
        for start in range(0, len(images), BATCH_SIZE):
            batch = [
                image if isinstance(image, Image.Image) else Image.fromarray(image)
                for image in images[start : start + BATCH_SIZE]
            ]
            pixels = self.prepare(batch, return_tensors="pt")["pixel_values"]
            found = self.model.get_image_features(pixel_values=pixels.to(self.model.device))
            parts.append(found.pooler_output)
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Embed texts, each distinct one once. Returns (B, D) of unit length."""
        distinct = list(dict.fromkeys(texts))
        parts = []
        for start in range(0, len(distinct), BATCH_SIZE):
            with self._tokenizing:
                tokens = self.tokenizer(
                    distinct[start : start + BATCH_SIZE],
                    padding="max_length",
                    truncation=True,
                    max_length=self.max_length,
                    return_tensors="pt",
                ).to(self.model.device)
            parts.append(self.model.get_text_features(**tokens).pooler_output)
        features = torch.nn.functional.normalize(torch.cat(parts), dim=-1)
        rows = {text: row for row, text in enumerate(distinct)}
        return features[[rows[text] for text in texts]]

    def cosines(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
        """Return the cosine of each picture with its own text, (B,) float64."""
        both = self.image_features(images) * self.text_features(texts)
        return both.sum(-1).double().cpu().numpy()


@cache
def load(path: str, processor_path: str, device: str) -> Clip:
    """Load a CLIP from a folder or the hub, once a process. processor_path: of its tokenizer."""
    return Clip(CLIPModel.from_pretrained(path, dtype=torch.float32), processor_path, device)
