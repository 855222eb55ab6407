"""What every command shows: one message at a user's mistake, a bar for long work."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
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


def progress(total: int, desc: str, *, shown: bool = True, initial: int = 0) -> tqdm:
    """Return a progress bar, for a terminal alone. shown: False on all ranks but the main one."""
    return tqdm(
        total=total, desc=desc, initial=initial, leave=False, disable=None if shown else True
    )
