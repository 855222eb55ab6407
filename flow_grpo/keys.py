"""A key of a config: default, meaning and range, declared once, and the one check of them all."""

import ast
import math
import os
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import reduce
from numbers import Integral, Real
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from flow_grpo.cli import did_you_mean

NOUNS = {bool: "True or False", int: "whole number", float: "number", str: "text"}
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Key:
    """A key of a config, and the values that it may have.

    default: a bool, number or text, a tuple or dict of these, or None: not set. of: the type of an
    entry, or of what is not None, where the default does not tell it. least, most, above and below
    bound a number or the entries of a tuple or dict; every number has a bound at either end.
    """

    default: Any
    meaning: str = ""
    _: KW_ONLY
    of: type | None = None
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    is_path: bool = False  # of a file or folder, where ~ is the home

    def __post_init__(self) -> None:
        ends = (self.least, self.above), (self.most, self.below)
        lower, upper = ([bound for bound in end if bound is not None] for end in ends)
        needed = int(self.kind in (int, float))
        assert len(lower) == len(upper) == needed, f"{self}: a number needs a bound at either end"
        assert all(map(math.isfinite, lower + upper)), f"{self}: its bounds must be finite"
        assert self.default is not None or self.of, f"{self}: say which type it is `of`"
        assert self.allows(self.default), f"{self}: its default is not allowed"

    @property
    def kind(self) -> type | None:
        """The type of a value, or of the entries of a tuple or dict; None: any."""
        entries = _entries(self.default)
        return self.of or (type(entries[0]) if entries else None)

    @property
    def needed(self) -> str:
        noun, limits = NOUNS.get(self.kind, "value"), ""
        if self.kind in (int, float):
            lower = f"above {self.above:,}" if self.least is None else f"at least {self.least:,}"
            upper = f"below {self.below:,}" if self.most is None else f"at most {self.most:,}"
            limits = f" of {lower} and {upper}" if self.above is None else f" {lower} and {upper}"
        if self.choices:
            words = f"one of {', '.join(self.choices)}"
        elif isinstance(self.default, (tuple, Mapping)):
            words = f"a {_container(self.default)} of {noun}s{limits}"
        else:
            words = noun if self.kind is bool else f"a {noun}{limits}"
        return f"None or {words}" if self.default is None else words

    def allows(self, value: Any) -> bool:
        """Tell whether a value is of the right type and within the bounds. NaN never is."""
        if value is None:
            return self.default is None
        if _container(value) != _container(self.default):
            return False
        return all(map(self._allows_entry, _entries(value)))

    def _allows_entry(self, value: Any) -> bool:
        if self.kind not in (int, float):
            known = not self.choices or value in self.choices
            return self.kind is None or (isinstance(value, self.kind) and known)
        number = Integral if self.kind is int else Real
        if not isinstance(value, number) or isinstance(value, bool):
            return False
        reaches = value > self.above if self.least is None else value >= self.least
        return reaches and (value < self.below if self.most is None else value <= self.most)

    def parse(self, text: str) -> Any:
        """Read a value, as it was typed. Raises ValueError or SyntaxError."""
        if self.default is None and text == "None":
            return None
        if _container(self.default) is None:
            return self.parse_entry(text)
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            if self.kind is not str or isinstance(self.default, Mapping):
                raise
            value = text  # a tuple of one word, typed without quotes
        if isinstance(self.default, Mapping):
            if not (isinstance(value, dict) and all(isinstance(name, str) for name in value)):
                raise ValueError(text)
            return value
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)

    def parse_entry(self, text: str) -> Any:
        """Read an entry of a tuple or dict, or a value that is neither. Raises ValueError."""
        if self.kind is bool:
            if text.lower() not in BOOLEANS:
                raise ValueError(text)
            return BOOLEANS[text.lower()]
        return self.kind(text) if self.kind else ast.literal_eval(text)


class Config(ml_collections.ConfigDict):
    """A ConfigDict whose dicts may name a reward by package.module:function."""

    def __init__(self, *given, **named):
        super().__init__(*given, **named | {"allow_dotted_keys": True})


def build(keys: Mapping[str, Key]) -> ml_collections.ConfigDict:
    """Make a config of the defaults, locked: setting a key that is not here is an error."""
    config = Config()
    for name, key in keys.items():
        put(config, name, key)
    return config.lock()


def put(config: ml_collections.ConfigDict, name: str, key: Key) -> None:
    """Set a key to its default; neither it nor its section need be there."""
    *sections, last = name.split(".")
    with config.unlocked():
        for section in sections:
            if section not in config:
                config[section] = Config()
            config = config[section]
        config[last] = placeholder(key.of) if key.default is None else key.default


def parent(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
    """Return what holds a key: the section of section.key, or the config itself."""
    return reduce(lambda section, part: section[part], name.split(".")[:-1], config)


def get(config: ml_collections.ConfigDict, name: str) -> Any:
    """Return the value of section.key or key, a dict as a dict."""
    value = parent(config, name)[name.rpartition(".")[2]]
    return value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value


def has(config: ml_collections.ConfigDict, name: str) -> bool:
    section, _, last = name.rpartition(".")
    return last in (config.get(section, ()) if section else config)


def at(values: object, key: str) -> object:
    """Return section.key of what JSON holds, None where it lacks that."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def check(config: ml_collections.ConfigDict, keys: Mapping[str, Key]) -> None:
    """Raise ValueError naming key, value, need and remedy unless each value is allowed.

    Expands paths, too.
    """
    for name, key in keys.items():
        value = get(config, name)
        if not key.allows(value):
            meaning = f" ({key.meaning})" if key.meaning else ""
            hint = did_you_mean(value, key.choices) or f" The default is {key.default!r}."
            raise ValueError(f"config.{name}={value!r}: {key.needed} is needed{meaning}.{hint}")
        if key.is_path and isinstance(value, str):
            check_length(name, value)
    expand(config, keys)


def check_length(name: str, path: str) -> None:
    """Raise ValueError for a path that no file system takes, or leaves no room behind."""
    if len(os.fsencode(path)) > 2000 or max(map(len, os.fsencode(path).split(b"/"))) > 200:
        raise ValueError(
            f"config.{name}={path[:60]!r}...: a path of at most 2000 bytes, and 200 from one / to "
            f"the next, is needed. Shorten it."
        )


def expand(config: ml_collections.ConfigDict, keys: Mapping[str, Key]) -> None:
    """Write the home in place of ~ in every path, as a shell does not within --key=~/path.

    Raises ValueError for the home of a user who is not there.
    """
    for name, key in keys.items():
        value = get(config, name)
        if key.is_path and isinstance(value, str) and value.startswith("~"):
            found = os.path.expanduser(value)
            if found.startswith("~"):
                raise ValueError(
                    f"config.{name}={value!r}: there is no such user. Give the whole path, or one "
                    f"that begins with ./~ if its name does."
                )
            parent(config, name)[name.rpartition(".")[2]] = found


def _entries(value: Any) -> tuple:
    if isinstance(value, Mapping):
        return tuple(value.values())
    return value if isinstance(value, tuple) else (value,)


def _container(value: Any) -> str | None:
    if isinstance(value, Mapping):
        return "dict"
    return "tuple" if isinstance(value, tuple) else None
