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
    argv = _last_of_each(argv)
    config = _run_config(path, name)
    _known_keys(argv, config)
    values = flags.FlagValues()
    try:  # the definition already reads the overrides
        config_flags.DEFINE_config_file("config", default, flag_values=values, sys_argv=argv)
        rest = values(argv)
    except (flags.Error, TypeError) as error:
        raise ValueError(_explain(error, config)) from None
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


def _last_of_each(argv: list[str]) -> list[str]:
    """Let the last of repeated overrides win; absl would join tuples."""
    kept = {}
    for position, argument in enumerate(argv):
        key, equals, _ = argument.partition("=")
        kept[key if equals and key.startswith("--config.") else position] = argument
    return list(kept.values())


def _run_config(path: str, name: str) -> ml_collections.ConfigDict:
    """Let the config file itself refuse an unknown run, before absl hides its message."""
    get_config = runpy.run_path(path).get("get_config")
    if get_config is None:
        raise ValueError(f"--config={path}: the file has no function get_config(name).")
    return get_config(name) if name else get_config()


def _known_keys(argv: list[str], config: ml_collections.ConfigDict) -> None:
    keys = _keys(config)
    for argument in argv[1:]:
        match = re.match(r"--?(?:no)?config\.([\w.]*)", argument)
        if match and match.group(1) not in keys:
            near = difflib.get_close_matches(match.group(1), keys, n=1, cutoff=0.4)
            hint = f" Did you mean --config.{near[0]}?" if near else ""
            raise ValueError(
                f"{argument}: there is no key config.{match.group(1)}.{hint} All keys are in "
                f"config/base.py."
            )


def _explain(error: Exception, config: ml_collections.ConfigDict) -> str:
    match = re.search(r"flag --?config\.([\w.]+)=(.*?): (.*)", str(error), re.DOTALL)
    if not match:
        return f"{error} {USAGE}"
    key, value, reason = match.groups()
    *parents, last = key.split(".")
    for parent in parents:
        config = config[parent]
    default = config[last]
    if isinstance(default, ml_collections.ConfigDict):
        default = default.to_dict()
    return (
        f"--config.{key}={value}: {reason.strip()}. A value like {default!r} "
        f"({config.get_type(last).__name__}) is needed."
    )


def _keys(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    keys = []
    for key, value in config.items():
        keys.append(prefix + key)
        if isinstance(value, ml_collections.ConfigDict):
            keys += _keys(value, f"{prefix}{key}.")
    return keys
