"""What images look like in two numbers, which rise or fall when a policy games a reward."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import Image


def looks(image: np.ndarray) -> tuple[float, float]:
    """Return how colourful and how sharp an image is, or a video's middle frame; both in [0, 1].

    image: uint8 ([F,] H, W, 3). The first is the mean over pixels of the largest channel less the
    smallest, the second the mean difference of neighbours in brightness, along both axes.
    """
    frame = image[len(image) // 2] if image.ndim == 4 else image
    chroma = frame.max(-1).astype(np.float64) - frame.min(-1)
    gray = np.asarray(Image.fromarray(frame).convert("L"), dtype=np.float64)
    steps = [np.abs(np.diff(gray, axis=axis)).mean() for axis in (0, 1)]
    return chroma.mean() / 255, sum(steps) / 2 / 255


def means(found: Iterable[tuple[float, float]]) -> dict[str, float]:
    """Average what looks() says of several images."""
    saturation, sharpness = np.mean(list(found), axis=0)
    return {"saturation": float(saturation), "sharpness": float(sharpness)}
