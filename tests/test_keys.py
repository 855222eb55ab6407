"""Keys of a config: what each allows, and the one check of them all."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from config.base import COMMON, base, keys_of, with_objective
from flow_grpo import keys
from flow_grpo.keys import Key
from flow_grpo.objectives.registry import OBJECTIVES

WHOLE = Key(3, least=1, most=8)
SHARE = Key(0.5, least=0, below=1)
POSITIVE = Key(2.0, above=0, most=10)
MAYBE = Key(None, of=int, least=1, most=8)
STEPS = Key((), of=int, least=0, most=9)
NAMES = Key(("a",))
WEIGHTS = Key({"a": 1.0}, least=-5, most=5)
SWITCH = Key(True)
CHOICE = Key("red", choices=("red", "green"))
FREE = Key({})


@pytest.mark.parametrize(
    "key, allowed, refused",
    [
        (WHOLE, [1, 8, np.int64(5)], [0, 9, 2.0, True, None, "3", (3,), math.nan, math.inf]),
        (SHARE, [0, 0.0, 0.999, np.float32(0.5)], [1, 1.0, -1e-9, math.nan, math.inf, "x", None]),
        (POSITIVE, [1e-300, 10, 3], [0, 0.0, -1, 10.1, math.nan, math.inf, -math.inf, False]),
        (MAYBE, [None, 1, 8], [0, 9, 1.5, "None", math.nan]),
        (STEPS, [(), (0,), (9, 0)], [(0, 10), (-1,), (0.5,), ("1",), (True,), 3, None, [1]]),
        (NAMES, [(), ("a", "b")], [("a", 1), "a", None]),
        (WEIGHTS, [{}, {"x": 0}, {"x": -5.0, "y": 5}], [{"x": 6}, {"x": "1"}, {"x": math.nan}, 1]),
        (SWITCH, [True, False], [1, 0, "True", None]),
        (CHOICE, ["red", "green"], ["Red", "", None, 1]),
        (FREE, [{}, {"x": [1, "two"]}], ["x", None, ()]),
    ],
)
def test_a_key_allows_values_of_its_type_within_its_bounds(key, allowed, refused):
    assert [value for value in allowed if not key.allows(value)] == []
    assert [value for value in refused if key.allows(value)] == []


@pytest.mark.parametrize(
    "key, words",
    [
        (WHOLE, "a whole number of at least 1 and at most 8"),
        (SHARE, "a number of at least 0 and below 1"),
        (POSITIVE, "a number above 0 and at most 10"),
        (MAYBE, "None or a whole number of at least 1 and at most 8"),
        (STEPS, "a tuple of whole numbers of at least 0 and at most 9"),
        (NAMES, "a tuple of texts"),
        (WEIGHTS, "a dict of numbers of at least -5 and at most 5"),
        (SWITCH, "True or False"),
        (CHOICE, "one of red, green"),
    ],
)
def test_what_is_needed_is_said_in_words(key, words):
    assert key.needed == words


@pytest.mark.parametrize(
    "wrong",
    [
        dict(default=3),
        dict(default=3, least=1),
        dict(default=3, most=8),
        dict(default=3, least=1, above=0, most=8),
        dict(default=3.0, least=0, most=math.inf),
        dict(default=3, least=4, most=8),
        dict(default="a", least=0, most=1),
        dict(default="blue", choices=("red", "green")),
        dict(default=None),
        dict(default=(), of=int),
    ],
)
def test_a_number_without_finite_bounds_or_a_default_outside_of_them_is_no_key(wrong):
    with pytest.raises(AssertionError):
        Key(**wrong)


@pytest.mark.parametrize(
    "key, text, value",
    [
        (WHOLE, "7", 7),
        (SHARE, "1e-3", 1e-3),
        (SHARE, "0", 0.0),
        (MAYBE, "None", None),
        (MAYBE, "4", 4),
        (STEPS, "(1, 2)", (1, 2)),
        (STEPS, "1, 2", (1, 2)),
        (STEPS, "[1]", (1,)),
        (STEPS, "1", (1,)),
        (STEPS, "()", ()),
        (NAMES, "to_q", ("to_q",)),
        (NAMES, "('to_q', 'to_k')", ("to_q", "to_k")),
        (WEIGHTS, "{'x': 1, 'y': -0.5}", {"x": 1, "y": -0.5}),
        (SWITCH, "False", False),
        (SWITCH, "true", True),
        (CHOICE, "None", "None"),
        (FREE, "{'x': ['u']}", {"x": ["u"]}),
    ],
)
def test_what_is_typed_becomes_a_value(key, text, value):
    read = key.parse(text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "key, text",
    [(WHOLE, "1.5"), (WHOLE, ""), (SHARE, "half"), (STEPS, "(1"), (SWITCH, "perhaps")]
    + [(WEIGHTS, "x"), (WEIGHTS, "(1, 2)"), (WEIGHTS, "{1: 2}"), (MAYBE, "none")],
)
def test_what_can_not_be_read_is_refused(key, text):
    with pytest.raises((ValueError, SyntaxError)):
        key.parse(text)


DECLARED = dict(COMMON)
for each in OBJECTIVES.values():
    DECLARED |= each.keys


def declared(name: str) -> Key:
    """As the first objective that has it declares it."""
    owners = [each.keys for each in OBJECTIVES.values() if name in each.keys]
    return owners[0][name] if owners else COMMON[name]


def refusal(name: str, value) -> str:
    """What check() says of a config with this value, put in whatever its type."""
    owners = [objective for objective, each in OBJECTIVES.items() if name in each.keys]
    config = base(owners[0] if owners else "grpo")
    with config.unlocked(), config.ignore_type():
        keys.parent(config, name)[name.rpartition(".")[2]] = value
    with pytest.raises(ValueError) as error:
        keys.check(config, keys_of(config))
    return str(error.value)


def outside(key: Key) -> list:
    """A number beyond each bound, and those that are none."""
    wide = [key.least - 1 if key.least is not None else key.above]
    wide += [key.most + 1 if key.most is not None else key.below]
    wide = [*map(key.kind, wide), math.nan, math.inf, -math.inf]
    if isinstance(key.default, tuple):
        return [(value,) for value in wide]
    return [{"x": value} for value in wide] if isinstance(key.default, dict) else wide


@pytest.mark.parametrize("name", [n for n, key in DECLARED.items() if key.kind in (int, float)])
def test_every_number_is_refused_beyond_either_bound_and_if_it_is_not_finite(name):
    key = declared(name)
    for value in outside(key):
        said = refusal(name, value)
        assert f"config.{name}={value!r}: {key.needed} is needed" in said
        assert f"The default is {key.default!r}." in said


@pytest.mark.parametrize("name", [n for n, key in DECLARED.items() if key.choices])
def test_every_choice_is_refused_with_the_list_and_the_nearest(name):
    key = declared(name)
    needed = f"config.{name}='%s': one of {', '.join(key.choices)} is needed"
    assert needed % "zzz" in (said := refusal(name, "zzz"))
    assert f"The default is {key.default!r}." in said
    near = max(key.choices, key=len)
    typed = near + "x"
    said = refusal(name, typed)
    assert needed % typed in said and f"Did you mean {near!r}?" in said


def test_the_defaults_of_every_objective_pass():
    for name in OBJECTIVES:
        config = base(name)
        keys.check(config, keys_of(config))
        assert config.objective == name and config.is_locked
        written = json.loads(config.to_json())
        for key, declared in keys_of(config).items():
            section, _, last = key.rpartition(".")
            value = (written[section] if section else written)[last]
            assert value == json.loads(json.dumps(declared.default)) or key == "objective", key


def test_the_common_keys_alone_need_no_torch():
    code = "import sys; from config.base import base; base(None)"
    code += (
        "; sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert base(None).objective == "" and set(keys_of(base(None))) == set(COMMON)


def test_configs_do_not_share_what_is_not_set():
    one, other = base(), base()
    one.height, one.reward_fn.jpeg_compressibility = 64, 0.5
    assert other.height is None and other.reward_fn.jpeg_compressibility == 1.0


def test_another_objective_adds_its_keys_and_leaves_what_was_set():
    config = base("grpo")
    config.train.beta = 0.5
    assert "nft" not in config
    assert with_objective(config, "nft") is config and config.objective == "nft"
    config.nft.beta = 0.25
    assert config.train.beta == 0.5 and config.is_locked
    with_objective(with_objective(config, "grpo"), "nft")
    assert config.train.beta == 0.5 and config.nft.beta == 0.25
    with pytest.raises(ValueError, match="config.objective='nfd': one of .* Did you mean 'nft'?"):
        with_objective(config, "nfd")


@pytest.mark.parametrize("path", ["x" * 201, "é" * 101, "a/" * 1001, f"/tmp/{'9' * 300}/x"])
@pytest.mark.parametrize("name", [name for name, key in COMMON.items() if key.is_path])
def test_a_path_that_no_file_system_takes_is_refused(name, path):
    said = refusal(name, path)
    assert f"config.{name}={path[:60]!r}..." in said and said.endswith("Shorten it.")
