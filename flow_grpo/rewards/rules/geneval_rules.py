"""GenEval's verdicts (arXiv:2310.11513) on objects that a detector has found; no model in here.

A row of metadata has "tag", "include": [{"class", "count", "color"?, "position"?: [relation, index
of an earlier clause]}] and perhaps "exclude": [{"class", "count"}].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE, CONFIDENCE_COUNTING = 0.3, 0.9  # a detection must exceed it; for the tag "counting"
MAX_OBJECTS = 16  # of each class
MARGIN = 0.1  # of both objects' sizes, within which they have no relative position
COLORS = "red orange yellow green blue purple pink brown black white".split()
RELATIONS = ("left of", "right of", "above", "below")
# COCO's classes in its order, by the names that GenEval's prompts use.
CLASSES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, "
    "fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, "
    "bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, "
    "sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, "
    "bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, "
    "carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, "
    "tv, laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, "
    "toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
).split(", ")
SCORES = ("soft", "strict", "official", "flow_grpo")


class Found(NamedTuple):
    """One object. box: left, top, right, bottom in pixels. mask: (H, W) bool, or None."""

    box: tuple[float, float, float, float]
    confidence: float = 1.0
    mask: np.ndarray | None = None


Objects = Mapping[str, Sequence[Found]]  # by class
Painter = Callable[[str, Sequence[Found]], list[str]]  # (class, objects) -> the color of each


def keep(objects: Objects, tag: str) -> dict[str, list[Found]]:
    """Keep what is confident enough, most confident first, at most MAX_OBJECTS of a class."""
    least = CONFIDENCE_COUNTING if tag == "counting" else CONFIDENCE
    kept = {}
    for name, found in objects.items():
        sure = [thing for thing in found if thing.confidence > least]
        if sure:
            kept[name] = sorted(sure, key=lambda thing: -thing.confidence)[:MAX_OBJECTS]
    return kept


def relations(a: Found, b: Found) -> set[str]:
    """Say where `a` is relative to `b`: none, one or two of RELATIONS.

    The offset of the centres, shortened on each axis by MARGIN of both objects' sizes, must exceed
    half the whole offset's length on an axis.
    """
    corners = np.array([a.box, b.box], np.float64).reshape(2, 2, 2)
    offset = np.subtract(*corners.mean(1))
    sizes = np.abs(corners[:, 1] - corners[:, 0]).sum(0)
    shortened = np.maximum(np.abs(offset) - MARGIN * sizes, 0) * np.sign(offset)
    if (np.abs(shortened) < 1e-3).all():
        return set()
    x, y = shortened / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation in RELATIONS if holds[relation]}


def _all_hold(relation: str, things: Sequence[Found], targets: Sequence[Found]) -> bool:
    return all(relation in relations(a, b) for a in things for b in targets)


def official(objects: Objects, row: Mapping, paint: Painter) -> bool:
    """Judge as the benchmark does: at least the count, of the most confident; nothing excluded."""
    correct, groups = True, []
    for clause in row.get("include", []):
        name, count = clause["class"], clause["count"]
        things = objects.get(name, [])[:count]
        holds = len(things) == count
        if holds and "color" in clause:
            holds = paint(name, things).count(clause["color"]) == count
        if holds and "position" in clause:
            relation, target = clause["position"]
            holds = groups[target] is not None and _all_hold(relation, things, groups[target])
        groups.append(things if holds else None)
        correct = correct and holds
    excluded = (len(objects.get(c["class"], [])) >= c["count"] for c in row.get("exclude", []))
    return correct and not any(excluded)


def strict_and_soft(
    objects: Objects, row: Mapping, paint: Painter, compat: str = ""
) -> tuple[bool, float]:
    """Judge as Flow-GRPO's reward (arXiv:2505.05470): exactly the count; "exclude" does not matter.

    Soft is the mean of a clause's marks, of all clauses: 1 - |found - asked| / asked for the count;
    0 for color and position together if the count is wrong; the same fraction for the color;
    1 or 0 for the position, which is not looked at if the color is wrong. It is in [0, 1], unless
    compat="flow_grpo" brings back two quirks of that code: marks for a count may be negative, and
    a wrong position gets its 0 and then a 1 as well.
    """
    assert compat in ("", "flow_grpo"), compat
    correct, groups, marks = True, [], []
    for clause in row.get("include", []):
        name, count = clause["class"], clause["count"]
        things = objects.get(name, [])
        mark = 1 - abs(len(things) - count) / count
        marks.append(mark if compat else max(0.0, mark))
        holds = len(things) == count
        if not holds and ("color" in clause or "position" in clause):
            marks.append(0.0)
        if holds and "color" in clause:
            painted = paint(name, things).count(clause["color"])
            marks.append(painted / count)
            holds = painted == count
        if holds and "position" in clause:
            relation, target = clause["position"]
            holds = groups[target] is not None and _all_hold(relation, things, groups[target])
            marks.append(float(holds))
            if compat and not holds and groups[target] is not None:
                marks.append(1.0)
        groups.append(things if holds else None)
        correct = correct and holds
    return correct, sum(marks) / len(marks) if marks else 0.0


def check_row(row: Mapping) -> None:
    """Raise ValueError if a row can't be judged: it would score 0 for ever."""
    if not row.get("include"):
        raise ValueError('no "include"')
    for number, clause in enumerate(row["include"]):
        if clause.get("class") not in CLASSES:
            raise ValueError(f"{clause.get('class')!r} is none of the detector's classes")
        if not isinstance(clause.get("count"), int) or clause["count"] < 1:
            raise ValueError(f"a count of {clause.get('count')!r}")
        if clause.get("color", COLORS[0]) not in COLORS:
            raise ValueError(f"color {clause['color']!r} is none of {', '.join(COLORS)}")
        relation, target = clause.get("position", (RELATIONS[0], -1))
        if relation not in RELATIONS or target >= number:
            raise ValueError(f"position {clause['position']!r}")
