"""GenEval's detector: a Mask2Former (arXiv:2112.01527) for COCO's instances, by transformers."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import Mask2FormerForUniversalSegmentation
from transformers.models.mask2former.image_processing_pil_mask2former import (
    Mask2FormerImageProcessorPil,
)

from flow_grpo.rewards.rules.geneval_rules import CLASSES, CONFIDENCE, Found

BATCH_SIZE = 8  # images of one size a call
MAX_DETECTIONS = 100  # of an image


class Detector:
    """Finds objects in images. Raises ValueError for a model of other than COCO's classes."""

    def __init__(self, path: str, device: str):
        model = Mask2FormerForUniversalSegmentation.from_pretrained(path, dtype=torch.float32)
        if model.config.num_labels != len(CLASSES):
            raise ValueError(
                f"config.rewards.geneval_detector={path!r} knows {model.config.num_labels} "
                f"classes; a Mask2Former trained on the {len(CLASSES)} of COCO instances is needed."
            )
        self.model = model.eval().requires_grad_(False).to(device)
        self.prepare = Mask2FormerImageProcessorPil.from_pretrained(path)

    @torch.inference_mode()
    def __call__(self, images: list[np.ndarray]) -> list[dict[str, list[Found]]]:
        """Return each image's objects by class. images: uint8 (H, W, 3), sizes may differ."""
        found: list = [None] * len(images)
        for size in dict.fromkeys(image.shape[:2] for image in images):
            rows = [n for n, image in enumerate(images) if image.shape[:2] == size]
            for start in range(0, len(rows), BATCH_SIZE):
                batch = rows[start : start + BATCH_SIZE]
                pictures = [Image.fromarray(images[n]) for n in batch]
                pixels = self.prepare(pictures, return_tensors="pt")["pixel_values"]
                output = self.model(pixel_values=pixels.to(self.model.device))
                predictions = zip(
                    output.class_queries_logits, output.masks_queries_logits, strict=True
                )
                for n, (logits, masks) in zip(batch, predictions, strict=True):
                    found[n] = objects(logits, masks, tuple(pixels.shape[-2:]), size)
        return found


def objects(
    logits: Tensor, masks: Tensor, input_size: tuple[int, int], size: tuple[int, int]
) -> dict[str, list[Found]]:
    """Read the objects out of one image's queries, as mmdetection does.

    logits: (Q, C + 1), the last class is "nothing". masks: (Q, h, w) logits. They are enlarged to
    the input's size and then to the image's; confidence is the class's probability times the
    mask's mean probability where it is above 1/2. Below CONFIDENCE a class is left out at once: the
    product can only be less. Boxes end one pixel past the mask.
    """
    best = logits.softmax(-1)[:, :-1].flatten().topk(min(MAX_DETECTIONS, logits[:, :-1].numel()))
    sure = best.values > CONFIDENCE
    queries, labels = best.indices[sure] // (logits.shape[1] - 1), best.indices[sure]
    labels = labels % (logits.shape[1] - 1)
    if not len(queries):
        return {}
    large = interpolate(masks[None, queries], input_size, mode="bilinear")
    large = interpolate(large, size, mode="bilinear")[0]  # (N, H, W)
    inside = large > 0
    area = inside.flatten(1).sum(1)
    quality = (large.sigmoid() * inside).flatten(1).sum(1) / (area + 1e-6)
    confidence = (best.values[sure] * quality).tolist()
    found: dict[str, list[Found]] = {}
    for n, label in enumerate(labels.tolist()):
        if area[n]:
            rows, columns = inside[n].any(1).nonzero(), inside[n].any(0).nonzero()
            box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            thing = Found(tuple(float(e) for e in box), confidence[n], inside[n].cpu().numpy())
            found.setdefault(CLASSES[label], []).append(thing)
    return found
