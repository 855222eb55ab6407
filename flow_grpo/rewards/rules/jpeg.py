"""How well a picture compresses, a reward without a model (DDPO, arXiv:2305.13301)."""

from io import BytesIO

import numpy as np
from PIL import Image

from flow_grpo.rewards.batch import Batch


def jpeg_incompressibility(batch: Batch) -> dict:
    """Score each picture by its size as a JPEG of quality 95, in kB; video by its mean frame."""
    return {"jpeg_incompressibility": np.array([_kilobytes(image) for image in batch.images])}


def jpeg_compressibility(batch: Batch) -> dict:
    """Score each picture by minus its JPEG size, in units of 500 kB."""
    return {"jpeg_compressibility": np.array([-_kilobytes(image) / 500 for image in batch.images])}


def _kilobytes(image: np.ndarray) -> float:
    frames = image if image.ndim == 4 else image[None]
    return float(np.mean([_frame_kilobytes(frame) for frame in frames]))


def _frame_kilobytes(frame: np.ndarray) -> float:
    buffer = BytesIO()
    Image.fromarray(frame).save(buffer, format="JPEG", quality=95)
    return buffer.tell() / 1000
