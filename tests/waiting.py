"""The one place of the tests that reads a clock: to end a wait that would have no end."""

import time
from collections.abc import Callable

HANG_S = 600  # what takes longer hangs; no test passes or fails by less


def wait_until(condition: Callable[[], bool], check: Callable[[], None] = lambda: None) -> None:
    """Wait for a condition. check: called meanwhile; raises where waiting has become pointless."""
    deadline = time.monotonic() + HANG_S
    while not condition():
        check()
        assert time.monotonic() < deadline, "hangs"
        time.sleep(0.02)
