"""A reward to be hacked: it pays for red, whatever was asked for (docs/hacking.md)."""

import numpy as np


def redness(images):
    """Return each image's mean of red less that of green and blue, 0 to 1."""
    parts = [image.reshape(-1, 3).mean(0) / 255 for image in images]
    return np.array([max(red - (green + blue) / 2, 0.0) for red, green, blue in parts])
