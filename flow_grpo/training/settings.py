"""Read a run's config from the command line; a mistake is a ValueError with a remedy. No torch."""

import difflib
import os
import re
import runpy

import ml_collections
from absl import flags
from ml_collections import config_flags

USAGE = "usage: SCRIPT [--config FILE.py:RUN] [--config.KEY=VALUE ...]"


def load(argv: list[str], default: str) -> tuple[ml_collections.ConfigDict, str]:
    """Return the locked config of `--config FILE.py:RUN` with its overrides, and the run's name.

    argv: the command line, program name first. default: the FILE.py:RUN used without --config.
    Raises ValueError naming the key, the value and the remedy.
    """
    if "--help" in argv or "-h" in argv:
        raise SystemExit(f"{USAGE}\nEvery key, its unit and default: config/base.py")
    target = _target(argv) or default
    path, _, name = target.partition(":")
    if not os.path.isfile(path):
        raise ValueError(
            f"--config={target}: there is no file {path!r} below {os.getcwd()}. Run from the "
            f"project's folder, with --config=config/grpo.py:general_ocr_sd3 for example."
        )
    _known_name(path, name)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", default, flag_values=values, sys_argv=argv)
    try:
        rest = values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError) as error:
        raise ValueError(_explain(error, argv, path, name)) from None
    if rest[1:]:
        raise ValueError(f"{rest[1]!r} is not an option. {USAGE}")
    return values["config"].value, name or "default"


def _target(argv: list[str]) -> str | None:
    """The last --config FILE.py:RUN of the command line, if there is one."""
    found = None
    for position, argument in enumerate(argv[1:], start=1):
        if re.fullmatch(r"--?config", argument) and position + 1 < len(argv):
            found = argv[position + 1]
        elif match := re.fullmatch(r"--?config=(.*)", argument):
            found = match.group(1)
    return found


def _known_name(path: str, name: str) -> None:
    """Let the config file itself refuse an unknown run, before absl hides its message."""
    get_config = runpy.run_path(path).get("get_config")
    if get_config is None:
        raise ValueError(f"--config={path}: the file has no function get_config(name).")
    get_config(name) if name else get_config()


def _explain(error: Exception, argv: list[str], path: str, name: str) -> str:
    text = str(error)
    if match := re.search(r"flag --?(config\.[\w.]+)=(.*?): (.*)", text, re.DOTALL):
        key, value, reason = match.groups()
        default = _lookup(runpy.run_path(path)["get_config"](*[name] if name else []), key)
        return (
            f"--{key}={value}: {reason.strip()}. A value like {default!r} "
            f"({type(default).__name__}) is needed."
        )
    wrong = re.search(r"'(\w+)'", text)
    used = [a for a in argv if a.startswith("--config.") and wrong and wrong.group(1) in a]
    if wrong and used:
        config = runpy.run_path(path)["get_config"](*[name] if name else [])
        key = used[0].split("=")[0].removeprefix("--")
        near = difflib.get_close_matches(
            key.removeprefix("config."), _keys(config), n=1, cutoff=0.4
        )
        hint = f" Did you mean --config.{near[0]}?" if near else ""
        return f"{used[0]}: there is no key {key}.{hint} All keys are in config/base.py."
    return f"{text} {USAGE}"


def _keys(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    keys = []
    for key in config:
        value = config.get_ref(key).get() if config.get_type(key) else config[key]
        keys.append(prefix + key)
        if isinstance(value, ml_collections.ConfigDict):
            keys += _keys(value, f"{prefix}{key}.")
    return keys


def _lookup(config: ml_collections.ConfigDict, key: str):
    for part in key.split(".")[1:]:
        config = config[part]
    return config
