"""What every command shows: one message at a user's mistake, a hint, a bar for long work."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def user_errors() -> Iterator[None]:
    """Leave with 1 and one message at a ValueError, the user's to mend.

    FLOW_GRPO_TRACEBACK=1 shows where it came from.
    """
    try:
        yield
    except ValueError as error:
        if os.environ.get("FLOW_GRPO_TRACEBACK"):
            raise
        sys.exit(f"ValueError: {error}")


def did_you_mean(
    word: object, known: Iterable[str], *, shown: str = "{!r}", cutoff: float = 0.6
) -> str:
    """Return a sentence that names the known word nearest to a wrong one; "" if none is near.

    shown: how the sentence writes it. cutoff: how near it must be, 1 for equal.
    """
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=cutoff)
    return f" Did you mean {shown.format(near[0])}?" if near else ""


def progress(total: int, desc: str, *, shown: bool = True, initial: int = 0) -> tqdm:
    """Return a progress bar, for a terminal alone. shown: False on all ranks but the main one."""
    return tqdm(
        total=total, desc=desc, initial=initial, leave=False, disable=None if shown else True
    )
