"""Each rank tells the others what it does, hears when one has failed, and waits for none for ever.

All by the store that the launcher, or the main rank, keeps: nobody is waited for in a collective.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from itertools import count
from threading import Event, Thread, main_thread

from torch.distributed import DistError, PrefixStore, Store, distributed_c10d

BEAT_S = 1.0  # from one sign of life to the next
SILENCE_S = 40.0  # without one: the process has died, its machine is gone, or it is stopped
LOAD_SILENCE_S = 300.0  # the same while it loads: a reader of files may hold Python's lock
QUIET_S = 10.0  # the same, where a rank has failed already; or this one, until it gives up too
GRACE_S = 45.0  # for a rank, once another one has failed, to draw its images and to meet it
CUT_GRACE_S = 15.0  # where it can only wait inside of a layer, from which nothing wakes it
DISK_S = 7200.0  # for one rank's reading and writing, which the others wait for
LONGEST_PAUSE_S = 0.1
SILENT = "no sign of"
NUMBERS = count(1)  # of what this process watched for


class Watch:
    """What this rank does, and a thread that tells so and looks at the others."""

    def __init__(self, rank: int, num_ranks: int):
        self.rank, self.num_ranks = rank, num_ranks
        self.failure = ""  # of another rank, as long as this one has not begun to end as well
        self._phase, self._since = "start", time.monotonic()
        self._store: Store | None = None  # not begun, or gone
        self._over, self._resigned, self._met, self._round = Event(), False, 0, "met"
        self._parent, self._machine = os.getppid(), os.environ.get("GROUP_RANK")  # torchrun's word
        self._seen: dict[int, tuple[list, int]] = {}  # each rank's last sign, at which look
        self._looks = 0  # counted, as all may be stopped and go on
        self._thread: Thread | None = None

    def begin(self, in_layers: bool) -> None:
        """Start to tell and to look. in_layers: the engine gathers in each layer."""
        if self.num_ranks == 1:
            return
        self._grace_s, prefix = CUT_GRACE_S if in_layers else GRACE_S, f"watch {next(NUMBERS)}"
        self._store, self._own = _connection(prefix), _connection(prefix)
        self._thread = Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()
        atexit.register(self.end)  # the interpreter must not end under a thread

    @property
    def phase(self) -> str:
        return self._phase

    @phase.setter
    def phase(self, name: str) -> None:
        self._phase, self._since = name, time.monotonic()

    def check(self) -> None:
        """Raise RuntimeError if another rank has failed, so that nothing is asked of it."""
        if self.failure and not self._resigned:
            raise RuntimeError(self.failure)

    def meet(self, patience_s: float = DISK_S) -> None:
        """Wait until all ranks have called this as often as this one has.

        Raises RuntimeError if another one has failed, or has not come within patience_s.
        """
        if (store := self._store) is None:
            return
        self._met += 1
        here, before = (f"{self._round}/{n}" for n in (self._met, self._met - 1))
        start, pause_s, world = time.monotonic(), 1e-3, range(self.num_ranks)
        try:
            if store.add(here, 1) == self.num_ranks:
                store.set(f"{here}/all", "")
            while True:
                self.check()
                waited_s, gone = time.monotonic() - start, self.gone(world)
                if store.check([f"{here}/all"]):
                    break
                if gone or waited_s > patience_s:
                    raise RuntimeError(f"waited {waited_s:.0f} s for {self.others()}")
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            if self.rank == 0:  # where nobody is any more
                store.delete_key(before), store.delete_key(f"{before}/all")
        except DistError:  # the launcher was killed: what follows does the waiting
            self._store = None

    def post(self, words: str) -> Store | None:
        """Tell the others that this rank has failed, and why; returns the store, if it is there.

        It ends by itself, and from now on ranks that have done so meet() each other alone.
        """
        self._resigned, self._met, self._round = True, 0, "met again"
        if (store := self._store) is not None:
            try:
                number = store.add("failures", 1)
                store.set(f"failure/{self.rank}", json.dumps([number, self.rank, words]))
                store.set("failed", "")
            except DistError:
                self._store = store = None
        return store

    def fine(self, store: Store) -> list[int]:
        """Return the ranks that have posted no failure."""
        return [n for n in range(self.num_ranks) if not store.check([f"failure/{n}"])]

    def first(self, store: Store) -> tuple[int, str]:
        """Return rank and words of the first failure that was posted."""
        keys = [f"failure/{n}" for n in range(self.num_ranks)]
        return tuple(min(json.loads(store.get(k)) for k in keys if store.check([k]))[1:])

    def gone(self, ranks: Iterable[int]) -> bool:
        """Tell whether one of these ranks has ended, or is silent for too long."""
        return any(self._ended(n) or self._is_silent(n) for n in ranks)

    def others(self, ranks: Iterable[int] | None = None) -> str:
        """Say what these ranks do, by default all others."""
        ranks = [n for n in range(self.num_ranks) if n != self.rank] if ranks is None else ranks
        return "; ".join(self._about(n) for n in ranks) or "no rank"

    def end(self) -> None:
        """Need no other rank any more, and let none miss this one."""
        if self._thread is not None:
            self._store = None
            self._over.set()
            self._thread.join()

    def _look(self) -> None:
        """Be the thread."""
        heard_at = 0.0
        while True:
            over, self._looks = self._over.is_set(), self._looks + 1
            try:
                failure = self._exchange()
            except DistError:
                failure = self._orphaned()
            if over:
                return
            if not failure:
                heard_at = 0.0
            elif not self._resigned:
                heard_at = heard_at or time.monotonic()
                self.failure = failure
                grace_s = self._grace_s if failure.startswith("rank ") else QUIET_S
                if time.monotonic() - heard_at > grace_s:
                    self._leave()
            self._over.wait(BEAT_S)

    def _exchange(self) -> str:
        """Give a sign of life and read those of the others; return which rank has failed, or ""."""
        self._sign()
        keys = [str(n) for n in range(self.num_ranks)]
        if not self._own.check(keys):
            return ""
        for n, text in enumerate(self._own.multi_get(keys)):
            if (sign := json.loads(text)) != self._seen.get(n, (None,))[0]:
                self._seen[n] = sign, self._looks
        if self._own.check(["failed"]):
            first, words = self.first(self._own)
            return f"rank {first} failed: {words}"
        silent = self._silent()
        return f"{SILENT} {self.others(silent)}" if silent else ""

    def _sign(self) -> None:
        seconds, ended = round(time.monotonic() - self._since), self._over.is_set()
        sign = [self._looks, self._phase, seconds, ended, os.getpid(), self._machine]
        self._own.set(str(self.rank), json.dumps(sign))

    def _orphaned(self) -> str:
        """Say that the store is gone; "" if its main rank ended, or this rank's launcher died.

        At a launcher's death ranks save, as faults/stop.py has it, and need no store to do so.
        """
        self._over.wait(BEAT_S)  # a process is orphaned a little after its parent's connections end
        if self._ended(0) or os.getppid() != self._parent:
            return ""
        return "the store of the ranks is gone: its machine, or who kept it there, has died"

    def _silent(self) -> list[int]:
        return [n for n in self._seen if not self._ended(n) and self._is_silent(n)]

    def _is_silent(self, rank: int) -> bool:
        loads = rank in self._seen and self._seen[rank][0][1] in ("start", "load")
        usual_s = LOAD_SILENCE_S if loads else SILENCE_S
        return self._silence_s(rank) > (QUIET_S if self._resigned else usual_s)

    def _silence_s(self, rank: int) -> float:
        return BEAT_S * (self._looks - self._seen[rank][1]) if rank in self._seen else 0.0

    def _ended(self, rank: int) -> bool:
        return rank in self._seen and self._seen[rank][0][3]

    def _about(self, rank: int) -> str:
        if rank not in self._seen:
            return f"rank {rank}, which has not said anything yet"
        (_, phase, seconds, ended, *_), _ = self._seen[rank]
        silence_s = self._silence_s(rank)
        silent = f", silent for {silence_s:.0f} s" if silence_s > 3 * BEAT_S else ""
        return f"rank {rank} (in {phase} for {seconds} s{', which has ended' if ended else silent})"

    def _leave(self) -> None:
        """End the process, whose main thread waits for what will not come."""
        frame = sys._current_frames().get(main_thread().ident)
        where = "".join(traceback.format_stack(frame))
        print(
            f"{where}\nrank {self.rank} ends: {self.failure}. This rank was in {self._phase} for "
            f"{time.monotonic() - self._since:.0f} s, where it is shown above.",
            file=sys.stderr,
            flush=True,
        )
        self._over.set()
        with suppress(DistError):
            self._sign()
        for rank in self._silent():  # a launcher asks first, and waits for long
            *_, pid, machine = self._seen[rank][0]
            if machine is not None and machine == self._machine:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        os._exit(1)


def _connection(prefix: str) -> Store:
    """Connect to the store once more: a connection serves one thread at a time."""
    store = distributed_c10d._get_default_store().clone()
    store.set_timeout(timedelta(seconds=SILENCE_S))
    return PrefixStore(prefix, store)
