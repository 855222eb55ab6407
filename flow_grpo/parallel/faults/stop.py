"""Leave in order at SIGTERM, SIGINT, SIGHUP, the launcher's death, or when rewards fail."""

import os
import signal
import time
from collections.abc import Callable

import torch

from flow_grpo.parallel.engine import Ranks

PATIENCE_S = 5.0  # from one signal to another that ends the process at once
POLL_S = 5.0  # until several ranks look again, in the midst of a step
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(Exception):
    """The run ends before its time, on all ranks; the message says why."""

    def __init__(self, reason: str, exit_status: int = 1):
        super().__init__(reason)
        self.exit_status = exit_status


class Stop:
    """Remembers a request to end until check(), where all ranks learn of it together.

    A second signal after PATIENCE_S ends the process at once; launchers repeat the first one.
    """

    def __init__(self, ranks: Ranks, clock: Callable[[], float] = time.monotonic):
        self._ranks, self._clock = ranks, clock
        self._number, self._since = 0, 0.0
        self._polls, self._every = 0, 1
        # Only a launcher's death counts: a run under nohup outlives its shell.
        launched = any(n.startswith(("ACCELERATE_", "TORCHELASTIC_")) for n in os.environ)
        self._parent = os.getppid() if launched else None
        for number in SIGNALS:
            # nohup lets SIGHUP be ignored, and means it; a shell's "&" does so to SIGINT.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._remember)

    @property
    def asked(self) -> bool:
        """Whether this rank was asked to end."""
        if self._parent is not None and os.getppid() != self._parent:
            self._number = self._number or signal.SIGTERM
        return self._number > 0

    def _remember(self, number: int, frame: object) -> None:
        if not self._number:
            self._number, self._since = number, self._clock()
            if self._ranks.is_main:
                word = f"{signal.Signals(number).name}: ends in order, at once after another one"
                os.write(2, f"\n{word} in {PATIENCE_S:g} s or more\n".encode())
        elif self._clock() - self._since > PATIENCE_S:
            os._exit(128 + number)

    def pace(self, seconds: float) -> None:
        """Say how long it is from one poll() to the next. All ranks must call it, rank 0 counts."""
        every = max(1, int(POLL_S / max(seconds, 1e-9)))
        self._every = self._ranks.broadcast_object(every)

    def poll(self) -> None:
        """Do as check(), where that would cost too much. All ranks must call it equally often.

        A rank alone looks at each call, several together about every POLL_S, by pace().
        """
        self._polls += 1
        alone = self._ranks.num_ranks == 1
        if self.asked if alone else self._polls % self._every == 0:
            self.check()

    def check(self) -> None:
        """Raise Stopped on every rank if any rank was asked to end. All ranks must call it."""
        asked = torch.tensor([self._number if self.asked else 0], device=self._ranks.device)
        number = int(self._ranks.gather(asked).max())
        if number:
            raise Stopped(f"stopped by {signal.Signals(number).name}", 128 + number)
