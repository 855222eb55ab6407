"""What commands show: one message at a mistake, a hint, a bar."""

import difflib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

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


def make_writable(folder: Path, key: str) -> None:
    """Make a folder, if need be, and try to write there. Raises ValueError naming the key."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{key}: {folder} can't be written to ({error}). Name another.") from None
