"""One thread that owns the scorer: it merges what waits, scores it, and takes failures apart."""

from __future__ import annotations

import errno
import json
import logging
import queue
import struct
import threading
import time
import traceback
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from flow_grpo.cli import redacted
from flow_grpo.rewards.batch import Batch, scatter
from flow_grpo.rewards.remote.wire import MAX_ERROR, cut, encode_answer

# What a scorer raises for an input that it can't take; anything else is its own failure.
OF_INPUT = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError),
    *(OSError, EOFError, SyntaxError, struct.error, zlib.error, Image.DecompressionBombError),
)  # the second line has those of files that can't be read
OF_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)
Score = Callable[[Batch], dict[str, np.ndarray]]  # (B,) columns; raises what the scorer raises
Scored = tuple[dict[str, np.ndarray], list[str | None]]  # (B,) columns and each row's error


class Unscorable(Exception):
    """No row of a request could be scored, as its input does not suit the reward."""


@dataclass
class _Job:
    batch: Batch
    answer: Future = field(default_factory=Future)  # of encode_answer()'s JSON

    @property
    def kind(self) -> tuple[bool, bool]:
        """Only requests of one kind are merged."""
        return self.batch.references is None, self.batch.group is None


class Batcher:
    """Scores requests in the order of arrival, up to max_rows images a call, or a whole group.

    linger_s: how long a call that is not full waits for more.
    """

    def __init__(
        self,
        score: Score,
        max_rows: int,
        linger_s: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._score, self._max_rows, self._linger_s = score, max_rows, linger_s
        self._clock = clock
        self._queue: queue.Queue[_Job | None] = queue.Queue()  # None: the end
        self._held: _Job | None = None  # taken, but for the next call
        self._busy_since: float | None = None
        self.num_calls = self.num_scored = self.num_row_errors = 0
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._work, name="scorer", daemon=True)
        self._thread.start()

    def submit(self, batch: Batch) -> Future:
        """Queue a request; the result is its answer's bytes, Unscorable, or the scorer's error."""
        job = _Job(batch)
        self._queue.put(job)
        return job.answer

    def busy_s(self) -> float:
        """Return the seconds that the scorer's present call has taken."""
        since = self._busy_since
        return 0.0 if since is None else self._clock() - since

    def close(self, patience_s: float) -> None:
        """Finish what is queued, unless that takes longer."""
        self._queue.put(None)
        self._thread.join(patience_s)

    def _work(self) -> None:
        while jobs := self._gather():
            self._busy_since = start = self._clock()
            try:
                self._serve(jobs)
            except BaseException as error:  # a bug here must not leave anyone waiting
                for job in jobs:
                    if not job.answer.done():
                        job.answer.set_exception(error)
            jobs.clear()  # what they hold is free before the next one comes
            self._busy_since = None
            self.seconds += self._clock() - start

    def _gather(self) -> list[_Job]:
        """Wait for a request and take those that may share its call; [] at the end."""
        first, self._held = self._held or self._queue.get(), None
        if first is None:
            return []
        jobs, num_rows = [first], len(first.batch)
        deadline = time.monotonic() + self._linger_s
        while num_rows < self._max_rows:
            try:
                job = self._queue.get(timeout=max(deadline - time.monotonic(), 0))
            except queue.Empty:
                break
            if job is None:
                self._queue.put(None)
                break
            if job.kind != first.kind or num_rows + len(job.batch) > self._max_rows:
                self._held = job
                break
            jobs.append(job)
            num_rows += len(job.batch)
        return jobs

    def _serve(self, jobs: list[_Job]) -> None:
        """Score the requests together; if that fails, each by itself."""
        try:
            if len(jobs) > 1:
                scores, errors = self._rows(_merge([job.batch for job in jobs]))
            else:
                scores, errors = self._apart(jobs[0].batch)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._serve([job])
            else:
                said = redacted(traceback.format_exc())
                logging.getLogger(__name__).error("the scorer failed\n%s", said)
                jobs[0].answer.set_exception(error)
            return
        start = 0
        for job in jobs:
            rows = slice(start, start + len(job.batch))
            part = {name: values[rows] for name, values in scores.items()}
            self._answer(job, part, errors[rows])
            start = rows.stop

    def _apart(self, batch: Batch) -> Scored:
        """Score rows; if that fails, by row or group, so that only the guilty go without."""
        try:
            return self._rows(batch)
        except OF_INPUT as error:
            if not _of_input(error):
                raise
            units = batch.units()
            if len(units) == 1:
                return {}, [redacted(f"{type(error).__name__}: {error}")[:MAX_ERROR]] * len(batch)
        parts, errors = [], [None] * len(batch)
        for unit in units:
            scores, unit_errors = self._apart(batch.rows(unit))
            parts.append((unit, scores))
            for row, error in zip(unit, unit_errors, strict=True):
                errors[row] = error
        return scatter(parts, len(batch)), errors

    def _rows(self, batch: Batch) -> Scored:
        """Score what can be read, in calls of at most max_rows where groups allow it."""
        unreadable = batch.errors or {}
        errors = [unreadable.get(row) for row in range(len(batch))]
        rows = [row for row in range(len(batch)) if row not in unreadable]
        if not rows:
            raise ValueError(errors[0])
        readable, parts = batch.rows(rows), []
        for call in cut(readable, self._max_rows):
            parts.append(([rows[n] for n in call], self._score(readable.rows(call))))
            self.num_calls += 1
        return scatter(parts, len(batch)), errors

    def _answer(self, job: _Job, scores: dict[str, np.ndarray], errors: list) -> None:
        if not scores:
            job.answer.set_exception(Unscorable(errors[0]))
            return
        num_errors = sum(error is not None for error in errors)
        self.num_scored += len(errors) - num_errors
        self.num_row_errors += num_errors
        answer = encode_answer(scores, errors)
        job.answer.set_result(json.dumps(answer, allow_nan=False).encode())


def _of_input(error: Exception) -> bool:
    """Tell whether a row is at fault, not the network or the machine."""
    if isinstance(error, OSError):
        lost = isinstance(error, (ConnectionError, TimeoutError))
        return not lost and error.errno not in OF_MACHINE
    return True


def _merge(batches: list[Batch]) -> Batch:
    """Put requests of one kind together; their groups are numbered anew, and stay apart."""
    groups: list[np.ndarray] = []
    for batch in batches:
        if batch.group is not None:
            _, index = np.unique(batch.group, return_inverse=True)
            groups.append(index + (groups[-1].max() + 1 if groups else 0))
    return replace(Batch.cat(batches), group=np.concatenate(groups) if groups else None)
