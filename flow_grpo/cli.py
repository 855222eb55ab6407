"""What every command does with a user's mistake."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
