"""How much the images of one prompt differ: it shrinks when a policy collapses."""

from __future__ import annotations

import numpy as np
from PIL import Image

SIDE = 32  # pixels of a thumbnail


def thumbnails(images: list[np.ndarray]) -> np.ndarray:
    """Shrink uint8 (H, W, 3) images, or the middle frames of videos, to (N, SIDE * SIDE * 3)."""
    middle = [image[len(image) // 2] if image.ndim == 4 else image for image in images]
    small = [
        np.asarray(Image.fromarray(each).resize((SIDE, SIDE), Image.Resampling.BOX))
        for each in middle
    ]
    return np.stack(small).reshape(len(images), -1)


def diversity(thumbnails: np.ndarray, group: np.ndarray) -> float:
    """Average over all pairs within groups the root mean square difference of their pixels.

    thumbnails: (N, P) uint8. group: (N,). Returns a number in [0, 1]; NaN if there is no pair.
    """
    distances = []
    for number in np.unique(group):
        rows = thumbnails[group == number].astype(np.float64) / 255
        squares = (rows**2).sum(1)
        squared = squares[:, None] + squares[None] - 2 * rows @ rows.T
        pairs = np.triu_indices(len(rows), k=1)
        distances.append(np.sqrt(squared[pairs].clip(min=0) / rows.shape[1]))
    found = np.concatenate(distances)
    return float(found.mean()) if len(found) else float("nan")
