"""What commands show: one message at a mistake, a hint, a bar. What they are given by name."""

import difflib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryFile
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
HIDDEN = "***"
# In a URL: what stands before an @, and in its query or fragment what is named like a secret.
_SECRETS = re.compile(
    r"""(?<=://)[^\s"'<>]*(?=@)
    | (?<=[?&;#]) (?P<name>[\w.~%+-]*
        (?:key|token|secret|passw(?:or)?d|pwd|auth|sig|signature|credentials?|session)[\w.~%+-]*=)
        [^&;\#\s"'<>]*""",
    re.VERBOSE | re.IGNORECASE,
)


@contextmanager
def user_errors() -> Iterator[None]:
    """Leave with 1 and one message at a ValueError; FLOW_GRPO_TRACEBACK=1 shows its origin."""
    try:
        yield
    except ValueError as error:
        if os.environ.get("FLOW_GRPO_TRACEBACK"):
            raise
        sys.exit(redacted(f"ValueError: {error}"))


def redacted(value: T) -> T:
    """Hide passwords and keys of URLs in a text, or in all texts of what JSON can hold."""
    if isinstance(value, str):
        return _SECRETS.sub(lambda found: (found["name"] or "") + HIDDEN, value)
    if isinstance(value, dict):
        return {redacted(name): redacted(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(redacted, value))
    return value


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


def load_named(name: str, what: str, kind: str) -> Any:
    """Import "module:attribute", maybe from the current folder, or raise ValueError.

    what: how the error names it. kind: of attribute that is needed.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return resolve_name(name)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(
            f"{what} can't be imported ({type(error).__name__}: {error}). An importable module and "
            f"a {kind} in it are needed, as module:{kind}."
        ) from error


def make_writable(folder: Path, key: str) -> None:
    """Make a folder, if need be, and try to write there. Raises ValueError naming the key."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{key}: {folder} can't be written to ({error}). Name another.") from None
