"""Read a run's config from the command line; a mistake is a ValueError with a remedy."""

from __future__ import annotations

import os
import re
import runpy
from collections.abc import Mapping

from ml_collections import ConfigDict

from config.base import keys_of, with_objective
from flow_grpo import keys
from flow_grpo.cli import did_you_mean
from flow_grpo.keys import Key
from flow_grpo.objectives.registry import OBJECTIVES

USAGE = "usage: SCRIPT [--config FILE.py:RUN] [--config.KEY=VALUE ...]"


def load(argv: list[str], default: str) -> tuple[ConfigDict, str]:
    """Return the locked config of `--config FILE.py:RUN` with its overrides, and the run's name.

    argv: the command line, program name first; the last of repeated keys counts. The objective's
    keys are added before the rest is read. default: the FILE.py:RUN used without --config.
    Raises ValueError naming the key, the value and the remedy.
    """
    if "--help" in argv or "-h" in argv:
        raise SystemExit(
            f"{USAGE}\nEvery key, its default, unit and range: config/base.py; of an objective's "
            f"own: its file in flow_grpo/objectives/."
        )
    given = parse(argv[1:])
    target = given.pop("config", default)
    config = _run_config(target)
    with_objective(config, given.get("config.objective", config.objective))
    declared = keys_of(config)
    for name, text in given.items():
        _set(config, declared, name.removeprefix("config."), text)
    keys.expand(config, declared)
    return config, target.partition(":")[2] or "default"


def parse(arguments: list[str]) -> dict[str, str]:
    """Read "--config.KEY=VALUE" and "--config.KEY VALUE" into {"config.KEY": "VALUE"}."""
    given, rest = {}, iter(arguments)
    for argument in rest:
        match = re.fullmatch(r"--?(config|config\.[^=]*)(=.*)?", argument, re.DOTALL)
        if not match:
            raise ValueError(f"{argument!r} is not an option. {USAGE}")
        value = next(rest, None) if match[2] is None else match[2][1:]
        if value is None:
            raise ValueError(f"{argument} has no value: {argument}=VALUE is needed. {USAGE}")
        given[match[1]] = value
    return given


def _run_config(target: str) -> ConfigDict:
    path, _, name = os.path.expanduser(target).partition(":")
    if not os.path.isfile(path):
        raise ValueError(
            f"--config={target}: there is no file {path!r} below {os.getcwd()}. Run from the "
            f"project's folder, with --config=config/grpo.py:general_ocr_sd3 for example."
        )
    get_config = runpy.run_path(path).get("get_config")
    if get_config is None:
        raise ValueError(f"--config={path}: the file has no function get_config(name).")
    return get_config(name) if name else get_config()


def _set(config: ConfigDict, declared: Mapping[str, Key], name: str, text: str) -> None:
    """Set a key, or an entry that a key's dict has already."""
    section, _, last = name.rpartition(".")
    is_dict = section in declared and isinstance(declared[section].default, Mapping)
    if name in declared:
        read = declared[name].parse
    elif is_dict and last in keys.get(config, section):
        read = declared[section].parse_entry
    else:
        raise ValueError(f"--config.{name}={text}: {_unknown(config, declared, name)}")
    current = keys.get(config, name)
    try:
        keys.parent(config, name)[last] = read(text)
    except (ValueError, SyntaxError):
        kind = declared[name].of if current is None else type(current)
        raise ValueError(
            f"--config.{name}={text}: A value like {current!r} ({kind.__name__}) is needed."
        ) from None


def _unknown(config: ConfigDict, declared: Mapping[str, Key], name: str) -> str:
    """Say what may have been meant by a name that is no key."""
    of_others = [objective for objective, each in OBJECTIVES.items() if name in each.keys]
    if of_others:
        return (
            f"this key is of the objective {' and '.join(of_others)}, and config.objective is "
            f"{config.objective!r}. Add --config.objective={of_others[0]}, or leave the key out."
        )
    hint = did_you_mean(name, declared, shown="--config.{}", cutoff=0.4)
    return f"there is no key config.{name}.{hint} All keys are in config/base.py."
