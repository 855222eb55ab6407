"""GenEval's rules on hand-made scenes. Truth: the rules as arXiv:2310.11513 states them."""

import pytest

from flow_grpo.rewards.rules.geneval_rules import (
    CLASSES,
    COLORS,
    Found,
    check_row,
    keep,
    official,
    relations,
    strict_and_soft,
)


def at(x, y, size=20, confidence=0.95):
    """A square object with its centre at x, y."""
    return Found((x - size / 2, y - size / 2, x + size / 2, y + size / 2), confidence)


def paints(**colors):
    """A painter that knows each class's colors in the order of its objects."""
    return lambda name, things: colors[name][: len(things)]


def clause(name, count=1, **more):
    return {"class": name, "count": count, **more}


def row(*include, **more):
    return {"tag": "", "include": list(include), **more}


L, M, R = at(20, 50), at(50, 50), at(80, 50)  # left, middle, right
UP, DOWN = at(50, 20), at(50, 80)
BEFORE = ["left of", 0]

# name: (objects, row, colors, official, strict, soft, soft of compat="flow_grpo")
SCENES = {
    "one asked, one there": ({"dog": [M]}, row(clause("dog")), {}, 1, 1, 1, 1),
    "one asked, none there": ({}, row(clause("dog")), {}, 0, 0, 0, 0),
    "another class there": ({"cat": [M]}, row(clause("dog")), {}, 0, 0, 0, 0),
    "others do not matter": ({"dog": [M], "cat": [L]}, row(clause("dog")), {}, 1, 1, 1, 1),
    "one asked, two there": ({"dog": [L, R]}, row(clause("dog")), {}, 1, 0, 0, 0),
    "one asked, three there": ({"dog": [L, M, R]}, row(clause("dog")), {}, 1, 0, 0, -1),
    "one asked, sixteen there": ({"dog": [M] * 16}, row(clause("dog")), {}, 1, 0, 0, -14),
    "two asked, two there": ({"dog": [L, R]}, row(clause("dog", 2)), {}, 1, 1, 1, 1),
    "two asked, one there": ({"dog": [L]}, row(clause("dog", 2)), {}, 0, 0, 0.5, 0.5),
    "two asked, three there": ({"dog": [L, M, R]}, row(clause("dog", 2)), {}, 1, 0, 0.5, 0.5),
    "four asked, one there": ({"dog": [L]}, row(clause("dog", 4)), {}, 0, 0, 0.25, 0.25),
    "four asked, five there": ({"dog": [M] * 5}, row(clause("dog", 4)), {}, 1, 0, 0.75, 0.75),
    "two classes, both there": (
        {"dog": [L], "cat": [R]}, row(clause("dog"), clause("cat")), {}, 1, 1, 1, 1,
    ),
    "two classes, one there": (
        {"dog": [L]}, row(clause("dog"), clause("cat")), {}, 0, 0, 0.5, 0.5,
    ),
    "two classes, one twice": (
        {"dog": [L, M], "cat": [R]}, row(clause("dog"), clause("cat")), {}, 1, 0, 0.5, 0.5,
    ),
    "two classes, one three times": (
        {"dog": [L, M, UP], "cat": [R]}, row(clause("dog"), clause("cat")), {}, 1, 0, 0.5, 0,
    ),
    "excluded, below the count": (
        {"dog": [L, R]}, row(clause("dog", 2), exclude=[clause("dog", 3)]), {}, 1, 1, 1, 1,
    ),
    "excluded, at the count; soft and strict do not look": (
        {"dog": [L], "cat": [R]}, row(clause("dog"), exclude=[clause("cat")]), {}, 0, 1, 1, 1,
    ),
    "counting: one more is excluded": (
        {"dog": [L, M, R]}, row(clause("dog", 2), exclude=[clause("dog", 3)]), {}, 0, 0, 0.5, 0.5,
    ),
    "color right": (
        {"dog": [M]}, row(clause("dog", color="red")), {"dog": ["red"]}, 1, 1, 1, 1,
    ),
    "color wrong": (
        {"dog": [M]}, row(clause("dog", color="red")), {"dog": ["blue"]}, 0, 0, 0.5, 0.5,
    ),
    "nothing to color": ({}, row(clause("dog", color="red")), {}, 0, 0, 0, 0),
    "colored, one too many: the best one counts officially": (
        {"dog": [L, R]}, row(clause("dog", color="red")), {"dog": ["red", "blue"]}, 1, 0, 0, 0,
    ),
    "colored, one too many: the best one is wrong": (
        {"dog": [L, R]}, row(clause("dog", color="red")), {"dog": ["blue", "red"]}, 0, 0, 0, 0,
    ),
    "two colored, one wrong": (
        {"dog": [L, R]}, row(clause("dog", 2, color="red")), {"dog": ["red", "pink"]},
        0, 0, 0.75, 0.75,
    ),
    "two colored, both right": (
        {"dog": [L, R]}, row(clause("dog", 2, color="red")), {"dog": ["red", "red"]}, 1, 1, 1, 1,
    ),
    "two colored, one there": (
        {"dog": [L]}, row(clause("dog", 2, color="red")), {"dog": ["red"]}, 0, 0, 0.25, 0.25,
    ),
    "two classes colored, colors swapped": (
        {"dog": [L], "cat": [R]}, row(clause("dog", color="red"), clause("cat", color="blue")),
        {"dog": ["blue"], "cat": ["red"]}, 0, 0, 0.5, 0.5,
    ),
    "two classes colored, one swapped": (
        {"dog": [L], "cat": [R]}, row(clause("dog", color="red"), clause("cat", color="blue")),
        {"dog": ["red"], "cat": ["red"]}, 0, 0, 0.75, 0.75,
    ),
    "left of it": (
        {"dog": [R], "cat": [L]}, row(clause("dog"), clause("cat", position=BEFORE)), {},
        1, 1, 1, 1,
    ),
    "right of it, left asked": (
        {"dog": [L], "cat": [R]}, row(clause("dog"), clause("cat", position=BEFORE)), {},
        0, 0, 2 / 3, 3 / 4,
    ),
    "above it": (
        {"dog": [DOWN], "cat": [UP]}, row(clause("dog"), clause("cat", position=["above", 0])), {},
        1, 1, 1, 1,
    ),
    "below it": (
        {"dog": [UP], "cat": [DOWN]}, row(clause("dog"), clause("cat", position=["below", 0])), {},
        1, 1, 1, 1,
    ),
    "on the very same place": (
        {"dog": [M], "cat": [M]}, row(clause("dog"), clause("cat", position=BEFORE)), {},
        0, 0, 2 / 3, 3 / 4,
    ),
    "position, the target is missing": (
        {"cat": [L]}, row(clause("dog"), clause("cat", position=BEFORE)), {}, 0, 0, 1 / 3, 1 / 3,
    ),
    "position, the object is missing": (
        {"dog": [R]}, row(clause("dog"), clause("cat", position=BEFORE)), {}, 0, 0, 1 / 3, 1 / 3,
    ),
    "position, the target is there twice": (
        {"dog": [R, at(90, 50)], "cat": [L]}, row(clause("dog"), clause("cat", position=BEFORE)),
        {}, 1, 0, 1 / 3, 1 / 3,
    ),
    "position, the object is there twice": (
        {"dog": [R], "cat": [L, M]}, row(clause("dog"), clause("cat", position=BEFORE)), {},
        1, 0, 1 / 3, 1 / 3,
    ),
    "position, the target has the wrong color": (
        {"dog": [R], "cat": [L]},
        row(clause("dog", color="red"), clause("cat", position=BEFORE)), {"dog": ["blue"]},
        0, 0, 0.5, 0.5,
    ),
    "position is not looked at where the color is wrong": (
        {"dog": [R], "cat": [L]},
        row(clause("dog"), clause("cat", color="red", position=BEFORE)), {"cat": ["blue"]},
        0, 0, 2 / 3, 2 / 3,
    ),
    "color and position right": (
        {"dog": [R], "cat": [L]},
        row(clause("dog"), clause("cat", color="red", position=BEFORE)), {"cat": ["red"]},
        1, 1, 1, 1,
    ),
    "color right, position wrong": (
        {"dog": [L], "cat": [R]},
        row(clause("dog"), clause("cat", color="red", position=BEFORE)), {"cat": ["red"]},
        0, 0, 3 / 4, 4 / 5,
    ),
    "color and position asked, the count wrong: one 0 for both": (
        {"dog": [R], "cat": [L, M]},
        row(clause("dog"), clause("cat", color="red", position=BEFORE)), {"cat": ["red", "red"]},
        1, 0, 1 / 3, 1 / 3,
    ),
    "two asked, one of them on the wrong side": (
        {"dog": [M], "cat": [L, R]}, row(clause("dog"), clause("cat", 2, position=BEFORE)), {},
        0, 0, 2 / 3, 3 / 4,
    ),
    "two targets, left of only one": (
        {"dog": [L, R], "cat": [M]}, row(clause("dog", 2), clause("cat", position=BEFORE)), {},
        0, 0, 2 / 3, 3 / 4,
    ),
    "a chain of three": (
        {"dog": [R], "cat": [M], "bird": [L]},
        row(clause("dog"), clause("cat", position=BEFORE), clause("bird", position=["left of", 1])),
        {}, 1, 1, 1, 1,
    ),
    "a chain whose middle fails": (
        {"dog": [L], "cat": [M], "bird": [UP]},
        row(clause("dog"), clause("cat", position=BEFORE), clause("bird", position=["above", 1])),
        {}, 0, 0, 3 / 5, 4 / 6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCENES)
def test_scene(name):
    objects, wanted, colors, is_official, is_strict, soft, old = SCENES[name]
    paint = paints(**colors)
    assert official(objects, wanted, paint) == bool(is_official)
    assert strict_and_soft(objects, wanted, paint) == (bool(is_strict), pytest.approx(soft))
    strict_old = strict_and_soft(objects, wanted, paint, compat="flow_grpo")
    assert strict_old == (bool(is_strict), pytest.approx(old))


@pytest.mark.parametrize(
    ("a", "b", "found"),
    [
        (at(20, 50), at(80, 50), {"left of"}),
        (at(80, 50), at(20, 50), {"right of"}),
        (at(50, 20), at(50, 80), {"above"}),
        (at(50, 80), at(50, 20), {"below"}),
        (at(20, 20), at(80, 80), {"left of", "above"}),
        (at(80, 20), at(20, 80), {"right of", "above"}),
        (at(20, 80), at(80, 20), {"left of", "below"}),
        (at(50, 50), at(50, 50), set()),
        (at(48, 50), at(50, 50), set()),  # 2 < 0.1 x (20 + 20)
        (at(46, 50), at(50, 50), set()),  # exactly the margin
        (at(41, 50), at(50, 50), {"left of"}),  # (9 - 4) / 9 > 1/2
        (at(43, 50), at(50, 50), set()),  # (7 - 4) / 7 < 1/2
        (at(20, 50, size=200), at(50, 50), set()),  # (30 - 22) / 30 < 1/2
    ],
)
def test_relative_position_shortens_the_offset_by_a_tenth_of_both_sizes(a, b, found):
    assert relations(a, b) == found


def test_confidence_must_exceed_a_threshold_that_counting_raises():
    dogs = [at(1, 1, confidence=c) for c in (0.3, 0.31, 0.9, 0.91)]
    objects = {"dog": dogs, "cat": [at(1, 1, confidence=0.3)]}
    assert [t.confidence for t in keep(objects, "colors")["dog"]] == [0.91, 0.9, 0.31]
    assert keep(objects, "counting") == {"dog": dogs[3:]}


def test_at_most_sixteen_objects_of_a_class_are_kept():
    objects = {"dog": [at(n, 1, confidence=0.5 + n / 100) for n in range(20)]}
    assert [t.box[0] for t in keep(objects, "")["dog"]] == [n - 10.0 for n in range(19, 3, -1)]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({}, "include"),
        (row(clause("unicorn")), "unicorn"),
        (row(clause("dog", 0)), "count of 0"),
        (row(clause("dog", "two")), "two"),
        (row(clause("dog", color="teal")), "teal"),
        (row(clause("dog"), clause("cat", position=["near", 0])), "near"),
        (row(clause("dog", position=["above", 0])), "above"),
    ],
)
def test_a_row_that_can_not_be_judged_says_why(bad, message):
    with pytest.raises(ValueError, match=message):
        check_row(bad)


def test_the_classes_are_the_80_of_coco_and_the_colors_ten():
    assert len(CLASSES) == len(set(CLASSES)) == 80 and len(COLORS) == 10
    check_row(row(*(clause(name) for name in CLASSES)))
