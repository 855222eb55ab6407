"""The shapes reward: a rule-based verdict on small pictures of coloured shapes.

GenEval (arXiv:2310.11513) in small: the same kind of rows and of verdict (objects, counts, colours,
relative position), but with a checker in place of a detector, so that a reward costs no model and
0.3 ms an image. The pictures are 32 x 32, on a light-grey ground; dataset/shapes holds the prompts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flow_grpo.rewards.base import reward
from flow_grpo.rewards.batch import Batch

SIDE = 32  # pixels of an image's side
GROUND = (230, 230, 230)
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 75, 225),
    "yellow": (240, 205, 30),
    "purple": (150, 50, 190),
    "black": (25, 25, 25),
    "orange": (250, 130, 20),
    "cyan": (30, 195, 215),
}
SHAPES = ("circle", "square", "triangle", "diamond")
RELATIONS = ("left of", "right of", "above", "below")
SMALL_MAX, LARGE_MIN = 12.0, 15.0  # side of the bounding box in pixels; between them it is neither

MIN_AREA = 14  # pixels; less is a speck, not an object. The world's smallest shape has about 40
MIN_SHARE = 0.5  # of a colour in a pixel's mixture with the ground, to count as that colour
MAX_RESIDUAL = 60.0  # distance of a pixel to its colour's line, in 8-bit RGB; beyond: "unknown"
MIN_IOU = 0.8  # soft, with the best ideal shape; below it the shape is a "blob"
RELATION_MARGIN = 3.0  # pixels between the two centres along the relation's axis

_NAMES = tuple(COLORS)
_LINES = np.array([COLORS[name] for name in _NAMES], np.float32) - np.float32(GROUND)  # (C, 3)
_LENGTHS_SQUARED = (_LINES**2).sum(1)  # (C,)
# Of each shape with a bounding box from -1 to 1: its area, and how far its centroid lies below 0.
_AREAS = {"circle": np.pi, "square": 4.0, "triangle": 2.0, "diamond": 2.0}
_SAGS = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3, "diamond": 0.0}
_Y, _X = np.mgrid[:SIDE, :SIDE] + 0.5  # centres of the pixels


class Found(NamedTuple):
    """One object found: centre and side of its bounding box in pixels, y downwards."""

    color: str  # of COLORS, or "unknown"
    shape: str  # of SHAPES, or "blob"
    x: float
    y: float
    side: float


def signed_distance(shape: str, u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """Return how far points lie outside a shape centred on 0, of bounding box 2 `radius` wide.

    u, v: coordinates (any equal shape), v downwards. Negative inside; exact near the edges, which
    is all that anti-aliasing needs. This is the one definition of the shapes, for the renderer and
    the checker.
    """
    u = np.abs(u)
    if shape == "circle":
        return np.hypot(u, v) - radius
    if shape == "square":
        return np.maximum(u, np.abs(v)) - radius
    if shape == "triangle":  # upright, isosceles
        return np.maximum(v - radius, (2 * u - v - radius) / 5**0.5)
    if shape == "diamond":
        return (u + np.abs(v) - radius) / 2**0.5
    raise ValueError(f"shape {shape!r} is not one of {', '.join(SHAPES)}")


def coverage(shape: str, x: float, y: float, radius: float, box: tuple = ()) -> np.ndarray:
    """Return the share of each pixel that a shape covers, [0, 1], anti-aliased by distance.

    x, y, radius: centre and half of the bounding box's side in pixels. box: two slices that crop
    the (32, 32) result.
    """
    distance = signed_distance(shape, _X[box] - x, _Y[box] - y, radius)
    return np.clip(0.5 - distance, 0, 1)


def _fit(share: np.ndarray, box: tuple[slice, slice]) -> tuple[float, str, float, float, float]:
    """Fit each shape to an object by its area and centroid, and return the best fit.

    share: the object's coverage of the pixels in `box`. Returns (iou, shape, x, y, radius). Not by
    the bounding box: it rests on tips, which an autoencoder rounds (a diamond becomes a circle).
    """
    area = share.sum()
    x, centroid_y = (share * _X[box]).sum() / area, (share * _Y[box]).sum() / area
    fits = []
    for shape in SHAPES:
        radius = (area / _AREAS[shape]) ** 0.5
        y = centroid_y - _SAGS[shape] * radius
        ideal = coverage(shape, x, y, radius, box)
        common = np.minimum(share, ideal).sum()
        fits.append((common / (area + ideal.sum() - common), shape, x, y, radius))
    return max(fits)


def _unmix(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Explain each pixel as a mixture of the ground and one colour, the one that fits best.

    The nearest colour would not do: the grey rim of an anti-aliased black shape is nearer to purple
    or green than to black. Returns labels (H, W) int, 0 ground, 1 + i the i-th colour, C + 1 a
    colour that the world does not have; and shares (H, W, C) in [0, 1] of each colour.
    """
    offset = image.reshape(-1, 3).astype(np.float32) - np.float32(GROUND)  # (P, 3)
    along = offset @ _LINES.T  # (P, C)
    shares = np.clip(along / _LENGTHS_SQUARED, 0, 1)
    lengths = (offset**2).sum(1, keepdims=True)
    residuals = lengths - 2 * shares * along + shares**2 * _LENGTHS_SQUARED
    best, rows = residuals.argmin(1), np.arange(len(offset))
    labels = np.where(shares[rows, best] > MIN_SHARE, best + 1, 0)
    labels[residuals[rows, best] > MAX_RESIDUAL**2] = len(_NAMES) + 1
    return labels.reshape(image.shape[:2]), shares.reshape(*image.shape[:2], -1)


def detect(image: np.ndarray) -> list[Found]:
    """Find the objects of a picture.

    image: (32, 32, 3) uint8. Returns them colour by colour; specks below MIN_AREA pixels are left
    out.
    """
    if image.shape != (SIDE, SIDE, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"The shapes reward needs images of ({SIDE}, {SIDE}, 3) uint8 and got "
            f"{image.shape} {image.dtype}. Set config.resolution to {SIDE} and "
            "config.pretrained.model to the testbed's base."
        )
    from scipy import ndimage  # not at the top: see rewards/base.py

    labels, shares = _unmix(image)
    found = []
    for label in np.flatnonzero(np.bincount(labels.ravel())[1:] >= MIN_AREA) + 1:
        parts, _ = ndimage.label(labels == label)
        for part, box in enumerate(ndimage.find_objects(parts), 1):
            if (parts[box] == part).sum() < MIN_AREA:
                continue
            box = tuple(slice(max(0, edge.start - 1), edge.stop + 1) for edge in box)  # its rim
            share = (parts[box] == part).astype(np.float32)
            if known := label <= len(_NAMES):
                share = np.where(share + (labels[box] == 0), shares[box][..., label - 1], 0)
            iou, shape, x, y, radius = _fit(share, box)
            color = _NAMES[label - 1] if known else "unknown"
            found.append(Found(color, shape if iou > MIN_IOU else "blob", x, y, 2 * radius))
    return found


def _relation_holds(relation: str, first: Found, second: Found) -> bool:
    dx, dy = second.x - first.x, second.y - first.y
    ahead = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    return ahead > RELATION_MARGIN


def _size_holds(size: str, thing: Found) -> bool:
    return thing.side <= SMALL_MAX if size == "small" else thing.side >= LARGE_MIN


def check(image: np.ndarray, metadata: dict[str, Any]) -> tuple[float, float]:
    """Judge one picture against one row of dataset/shapes.

    image: (32, 32, 3) uint8. Returns (dense, strict). strict is 1.0 when the picture holds exactly
    what was asked and nothing else, otherwise 0.0. dense is in [0, 1]: the mean over the kinds of
    object asked for of max(0, 1 - |found - asked| / asked), divided by 1 + extra / 2 where extra is
    the number of objects beyond those asked; halved where the relation or the size is wrong.
    """
    found, wanted = detect(image), metadata["include"]
    matches = [
        [thing for thing in found if (thing.shape, thing.color) == (want["class"], want["color"])]
        for want in wanted
    ]
    off = [abs(len(match) - want["count"]) for match, want in zip(matches, wanted, strict=True)]
    credits = [max(0.0, 1 - miss / want["count"]) for miss, want in zip(off, wanted, strict=True)]
    extra = max(0, len(found) - sum(want["count"] for want in wanted))
    dense = sum(credits) / len(credits) / (1 + 0.5 * extra)

    holds = all(
        _size_holds(want["size"], thing)
        for match, want in zip(matches, wanted, strict=True)
        if "size" in want
        for thing in match
    )
    if "relation" in metadata:
        first, second = (match[:1] for match in matches)
        holds = bool(first and second) and _relation_holds(metadata["relation"], *first, *second)
    exact = not any(off) and not extra and holds
    return dense * (1.0 if holds else 0.5), float(exact)


def check_rows(
    settings: Mapping[str, Any], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> None:
    """Raise ValueError for a row that is not of this world; it would score 0 for ever."""
    remedy = "Set config.dataset to dataset/shapes, or take another reward than shapes."
    for row, entry in enumerate(metadata):
        if not entry.get("include"):
            raise ValueError(f"metadata row {row} has no 'include': {entry}. {remedy}")
        if entry.get("relation", RELATIONS[0]) not in RELATIONS:
            raise ValueError(f"metadata row {row} has none of {RELATIONS}: {entry}. {remedy}")
        for want in entry["include"]:
            known = want.get("class") in SHAPES and want.get("color") in COLORS
            if not known or "count" not in want:
                raise ValueError(
                    f"metadata row {row} asks for {want}; needed are a class of {SHAPES}, "
                    f"a color of {_NAMES} and a count. {remedy}"
                )


@reward(check=check_rows)
def shapes(batch: Batch) -> dict[str, np.ndarray]:
    """Score images of shapes by their rows' metadata alone; the default reward of the testbed.

    Images are (32, 32, 3), the metadata rows of dataset/shapes. Returns (B,) float64 each:
    "shapes_strict" (0 or 1), "shapes_dense" ([0, 1]) and their mean "shapes".
    """
    check_rows({}, batch.prompts, batch.metadata)
    verdicts = [check(*row) for row in zip(batch.images, batch.metadata, strict=True)]
    dense, strict = np.array(verdicts, np.float64).reshape(-1, 2).T
    return {"shapes": (strict + dense) / 2, "shapes_strict": strict, "shapes_dense": dense}


@reward(check=check_rows)
def shapes_strict(batch: Batch) -> dict[str, np.ndarray]:
    """Score 1 for exactly what was asked and 0 for anything else, as `shapes` does."""
    return {"shapes_strict": shapes(batch)["shapes_strict"]}


@reward(check=check_rows)
def shapes_dense(batch: Batch) -> dict[str, np.ndarray]:
    """Score partial credit in [0, 1], as `shapes` does."""
    return {"shapes_dense": shapes(batch)["shapes_dense"]}
