"""What commands show: one message at a mistake, a hint, a bar; and how they read a user's rows."""

import difflib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm


@contextmanager
def user_errors() -> Iterator[None]:
    """Leave with 1 and one message at a ValueError; FLOW_GRPO_TRACEBACK=1 shows its origin."""
    try:
        yield
    except ValueError as error:
        if os.environ.get("FLOW_GRPO_TRACEBACK"):
            raise
        sys.exit(f"ValueError: {error}")


def did_you_mean(
    word: object, known: Iterable[str], *, shown: str = "{!r}", cutoff: float = 0.6
) -> str:
    """Name the known word nearest to a wrong one; "" if none is as near as cutoff (1: equal)."""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=cutoff)
    return f" Did you mean {shown.format(near[0])}?" if near else ""


def progress(total: int, desc: str, *, shown: bool = True, initial: int = 0) -> tqdm:
    """Return a bar, for a terminal alone. shown: False on all ranks but the main one."""
    return tqdm(
        total=total, desc=desc, initial=initial, leave=False, disable=None if shown else True
    )


def user_path(text: str) -> Path:
    """Read an option's path; after = a shell leaves ~ as it is."""
    return Path(os.path.expanduser(text))


def lines(path: Path) -> list[tuple[str, str]]:
    """Return where each line stands and the line, without blank ones. Raises ValueError."""
    try:
        text = path.read_text(encoding="utf-8").split("\n")  # not at other Unicode line ends
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}).") from None
    return [(f"{path}, line {n}", line) for n, line in enumerate(text, start=1) if line.strip()]


def json_rows(path: Path, key: str) -> Iterator[tuple[str, dict, list[Path]]]:
    """Read an object a line: yield where it stands, the object, and the images that it names.

    key: of a text that each needs. "image": one path, or a list, from the file's folder. Raises
    ValueError naming the file, the line and what is wrong with it.
    """
    for where, line in lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error}).") from None
        if not isinstance(row, dict) or not isinstance(row.get(key), str):
            raise ValueError(f'{where}: an object with a "{key}" text is needed.')
        named = row.get("image", [])
        names = [named] if isinstance(named, str) else named
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f'{where}: "image" must be a path or a list of paths.')
        yield where, row, [path.parent / name for name in names]
