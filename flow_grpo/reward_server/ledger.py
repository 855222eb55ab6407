"""What the requests of a server hold in memory, all together and each."""

from __future__ import annotations

import threading


class Full(Exception):
    """There is no room for more beside what others hold."""


class Ledger:
    """Bytes that may be held. A request that is alone gets what its own limits allow."""

    def __init__(self, limit: int):
        self.limit, self.total, self.lock = limit, 0, threading.Lock()


class Place:
    """One request's part of a ledger, from its first byte to its answer; any thread may use it."""

    def __init__(self, ledger: Ledger):
        self._ledger, self._held = ledger, 0

    def hold(self, num_bytes: int) -> None:
        """Take so many bytes more, before they are there. Raises Full."""
        ledger = self._ledger
        with ledger.lock:
            others = ledger.total - self._held
            if others and ledger.total + num_bytes > ledger.limit:
                raise Full(f"{others} bytes wait")
            self._held += num_bytes
            ledger.total += num_bytes

    def hand_over(self) -> Place:
        """Move what is held to a new place, so that another may release it."""
        with self._ledger.lock:
            other = Place(self._ledger)
            other._held, self._held = self._held, 0
            return other

    def release(self) -> None:
        with self._ledger.lock:
            self._ledger.total -= self._held
            self._held = 0
