"""The world of shapes as images: a random scene for a row of dataset/shapes, and its rendering.

Colours and shapes are defined beside the checker, in flow_grpo/rewards/rules/shapes.py.
"""

import random
from typing import Any, NamedTuple

import numpy as np

from flow_grpo.rewards.rules.shapes import COLORS, GROUND, SIDE, coverage

RADII = {
    1: (4.5, 10.0),
    2: (4.6, 6.4),
    3: (4.5, 5.4),
    4: (4.5, 5.2),
}  # by number of objects, in pixels
SIZE_RADII = {"small": (4.5, 5.4), "large": (8.2, 10.5)}
GAP = 1.5  # pixels between two bounding boxes
EDGE = 0.5  # pixels between a bounding box and the picture's edge
MIN_OFFSET = (
    6.0  # pixels between two centres along a relation's axis; the checker asks for half of it
)


class Item(NamedTuple):
    """One object of a scene; centre and half of its bounding box's side in pixels, y downwards."""

    color: str
    shape: str
    x: float
    y: float
    radius: float


def _place(radii: list[float], rng: random.Random) -> list[tuple[float, float]] | None:
    """Centres of objects that do not touch, or None where 60 throws found no room for all."""
    centres: list[tuple[float, float]] = []
    for _ in range(60):
        radius = radii[len(centres)]
        x, y = (rng.uniform(radius + EDGE, SIDE - radius - EDGE) for _ in range(2))
        if all(
            max(abs(x - a), abs(y - b)) > radius + other + GAP
            for (a, b), other in zip(centres, radii, strict=False)
        ):
            centres.append((x, y))
        if len(centres) == len(radii):
            return centres
    return None


def _related(centres: list[tuple[float, float]], relation: str) -> list[tuple[float, float]] | None:
    """The two centres, ordered to make the relation true; None if the other axis dominates."""
    (x0, y0), (x1, y1) = centres
    across, down = x1 - x0, y1 - y0
    horizontal = relation in ("left of", "right of")
    along, aside = (across, down) if horizontal else (down, across)
    if abs(along) < max(MIN_OFFSET, abs(aside)):
        return None
    first_is_before = relation in ("left of", "above")
    return centres if (along > 0) == first_is_before else centres[::-1]


def draw_scene(metadata: dict[str, Any], rng: random.Random) -> list[Item]:
    """Draw a scene that fulfils a row of dataset/shapes; its objects do not touch."""
    wanted = [want for want in metadata["include"] for _ in range(want["count"])]
    ranges = [SIZE_RADII.get(want.get("size"), RADII[len(wanted)]) for want in wanted]
    while True:
        radii = [rng.uniform(*limits) for limits in ranges]
        centres = _place(radii, rng)
        if centres and "relation" in metadata:
            ordered = _related(centres, metadata["relation"])
            if ordered is not None and ordered[0] != centres[0]:
                radii.reverse()  # a radius stays where it found room
            centres = ordered
        if centres:
            return [
                Item(want["color"], want["class"], x, y, radius)
                for want, (x, y), radius in zip(wanted, centres, radii, strict=True)
            ]


def render(scene: list[Item]) -> np.ndarray:
    """Paint a scene, anti-aliased by signed distance. Returns (32, 32, 3) fp32 in [0, 255]."""
    image = np.broadcast_to(np.float32(GROUND), (SIDE, SIDE, 3)).copy()
    for item in scene:
        share = coverage(item.shape, item.x, item.y, item.radius)[..., None].astype(np.float32)
        image += share * (np.float32(COLORS[item.color]) - image)
    return image
