"""A reward behind HTTP (flow_grpo/reward_server), under the signature of every scorer.

Every wait ends: a call has one deadline for its connections, uploads, answers and retries.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
import uuid
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import httpx
import numpy as np

from flow_grpo.rewards.base import Reward
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.remote import wire
from flow_grpo.rewards.remote.exchange import HEALTH_S, Refused, connect, detail, fetch, problem
from flow_grpo.rewards.remote.servers import Servers, SomeFailed

PART_ROWS, PART_BYTES = 64, 2**26  # of a request, unless a group is larger
BACKOFF_S, MAX_BACKOFF_S = 0.25, 15.0
SLOTS = 32  # requests of a process at a time to each URL
MAX_SCORER_FAILURES = 3  # answers of 500, which say that the scorer itself failed
COOL_DOWN_S = 30.0  # after a call in vain, calls fail at once for so long
BUSY = (408, 429, 502, 503, 504)  # an answer with one of these is worth another try


class Unavailable(Refused):
    """No server answered before the deadline."""


class _Retry(Exception):
    """An attempt came to nothing, and another may succeed."""

    def __init__(self, reason: str, status: int = 0, after_s: float = 0.0):
        super().__init__(reason)
        self.status, self.after_s = status, after_s


class _Part(NamedTuple):
    """One request."""

    num_rows: int
    kind: str  # content type
    body: bytes


@dataclass(eq=False)
class _Endpoint:
    """What is known of one URL."""

    url: str
    num_in_flight: int = 0
    num_failures: int = 0  # since it last answered
    avoid_until: float = 0.0  # on time.monotonic()'s clock

    def failed(self, error: _Retry) -> None:
        if error.status != 429:  # that is a healthy server's
            self.num_failures += 1
        pause = min(BACKOFF_S * 2**self.num_failures, COOL_DOWN_S)
        self.avoid_until = time.monotonic() + max(pause, error.after_s)

    def answered(self) -> None:
        self.num_failures, self.avoid_until = 0, 0.0


class RemoteReward(Reward):
    """Scores by HTTP. Calls are split at group boundaries, and the parts spread over the URLs.

    A part is retried, always under one id, after refused connections, timeouts and answers of BUSY
    until the deadline, after 500 MAX_SCORER_FAILURES times, and after nothing else. Once a deadline
    has passed the circuit is open: calls fail at once for COOL_DOWN_S, then a URL has to be healthy
    before anything is sent.
    """

    def __init__(self, name: str, servers: Servers):
        self.name, self.servers = name, servers
        self._endpoints = [_Endpoint(url) for url in servers.urls[name]]
        self._open_until, self._last_error = 0.0, ""  # 0: the circuit is closed
        self._loop: asyncio.AbstractEventLoop | None = None  # from the first call on
        self._client: httpx.AsyncClient | None = None
        self._starting, self._closed = threading.Lock(), False
        self._slots = asyncio.Semaphore(SLOTS * len(self._endpoints))
        self._random = random.Random()

    def __call__(self, images, prompts, metadata, references=None, group=None) -> dict:
        """Raises Refused, Unavailable or SomeFailed, at the latest at the deadline."""
        batch = Batch(images, prompts, metadata, references, group)
        rows = self._split(batch)
        parts = [_Part(len(r), *wire.encode(batch.rows(r), self.servers.encoding)) for r in rows]
        self._start()
        future = asyncio.run_coroutine_threadsafe(self._score(parts), self._loop)
        try:
            found = future.result(self.servers.timeout_s + 2 * HEALTH_S)
        except FutureTimeout:
            future.cancel()
            raise Unavailable(
                f"{self._endpoints[0].url}: {len(batch)} pictures still wait for their turn after "
                f"config.reward_timeout={self.servers.timeout_s:g} s"
            ) from None
        scores = _join(self.name, found, [len(r) for r in rows])
        errors = [error for _, part in found for error in part]
        failed = [row for row, error in enumerate(errors) if error is not None]
        if failed:
            raise SomeFailed(
                f"{', '.join(e.url for e in self._endpoints)}: {len(failed)} of {len(errors)} rows "
                f"have errors; row {failed[0]}: {errors[failed[0]][:300]}",
                scores,
            )
        return scores

    def close(self) -> None:
        with self._starting:
            ended, self._closed = self._closed or self._loop is None, True
        if ended:
            return

        async def end() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._client.aclose()

        with suppress(FutureTimeout):
            asyncio.run_coroutine_threadsafe(end(), self._loop).result(HEALTH_S)
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _start(self) -> None:
        with self._starting:
            if self._closed:
                raise Refused(f"{self._endpoints[0].url}: the run is ending")
            if self._loop is not None:
                return
            self._client, loop = connect(self.servers), asyncio.new_event_loop()

            def work() -> None:
                loop.run_forever()
                loop.close()

            threading.Thread(target=work, name="reward-http", daemon=True).start()
            self._loop = loop

    def _split(self, batch: Batch) -> list[list[int]]:
        """Rows of each request: whole groups, and at least a request for each URL if possible."""
        num_rows = min(PART_ROWS, -(-len(batch) // len(self._endpoints)))
        num_rows = max(1, min(num_rows, PART_BYTES * len(batch) // max(1, batch.num_bytes())))
        parts: list[list[int]] = [[]]
        for unit in batch.units():
            if parts[-1] and len(parts[-1]) + len(unit) > num_rows:
                parts.append([])
            parts[-1] += unit
        return parts

    async def _score(self, parts: list[_Part]) -> list[tuple[dict, list]]:
        """Send all parts at once; the first one in vain ends the others."""
        deadline = time.monotonic() + self.servers.timeout_s
        if self._open_until:
            await self._probe()
        tasks = [asyncio.ensure_future(self._send(part, deadline)) for part in parts]
        try:
            found = await asyncio.gather(*tasks)
        except Unavailable as error:
            self._open_until, self._last_error = time.monotonic() + COOL_DOWN_S, str(error)
            raise
        finally:
            for task in tasks:
                task.cancel()
        self._open_until = 0.0
        return found

    async def _probe(self) -> None:
        """With the circuit open, raise Unavailable until a URL is healthy again."""
        if time.monotonic() < self._open_until:
            raise Unavailable(f"{self._last_error} (not tried again within {COOL_DOWN_S:g} s)")
        urls = [endpoint.url for endpoint in self._endpoints]
        problems = await asyncio.gather(*(problem(self._client, self.name, u) for u in urls))
        if all(problems):
            self._open_until = time.monotonic() + COOL_DOWN_S
            raise Unavailable(problems[0])

    async def _send(self, part: _Part, deadline: float) -> tuple[dict, list]:
        """Send a part until it is answered, each time to the URL that looks best."""
        key, num_attempts, num_scorer_failures = uuid.uuid4().hex, 0, 0
        while True:
            num_attempts += 1
            try:
                async with self._slots:
                    endpoint = self._best()
                    # Half of the rest: a retry finds the result of an attempt that was only slow.
                    patience_s = (deadline - time.monotonic()) / 2
                    return await self._attempt(endpoint, part, key, patience_s)
            except _Retry as error:
                endpoint.failed(error)
                num_scorer_failures += error.status == 500
                pause = min(BACKOFF_S * 2 ** min(num_attempts, 16), MAX_BACKOFF_S)
                pause = max(pause * self._random.uniform(0.5, 1), error.after_s)
                if num_scorer_failures == MAX_SCORER_FAILURES:
                    raise Refused(f"{endpoint.url}: {error}") from None
                if pause > 0.7 * (deadline - time.monotonic()):  # too late for one more
                    raise Unavailable(
                        f"{endpoint.url}: no scores after {num_attempts} attempt(s) within "
                        f"config.reward_timeout={self.servers.timeout_s:g} s; the last: {error}"
                    ) from None
            await asyncio.sleep(pause)

    def _best(self) -> _Endpoint:
        now = time.monotonic()
        return min(self._endpoints, key=lambda e: (max(e.avoid_until, now), e.num_in_flight))

    async def _attempt(
        self, endpoint: _Endpoint, part: _Part, key: str, patience_s: float
    ) -> tuple[dict, list]:
        endpoint.num_in_flight += 1
        headers = {"content-type": part.kind, "idempotency-key": key}
        try:
            request = fetch(self._client, "POST", f"{endpoint.url}/score", part.body, headers)
            response, answer = await asyncio.wait_for(request, patience_s)
        except TimeoutError:
            raise _Retry(f"no answer within {patience_s:.3g} s") from None
        except httpx.TransportError as error:
            raise _Retry(f"{type(error).__name__}: {error}") from None
        finally:
            endpoint.num_in_flight -= 1
        if response.status_code != 200:
            reason = f"status {response.status_code}: {detail(answer)}"
            if response.status_code in (500, *BUSY):
                raise _Retry(reason, response.status_code, _retry_after(response))
            endpoint.answered()
            if response.status_code == 422:  # each row has an error
                return {}, [detail(answer)] * part.num_rows
            raise Refused(f"{endpoint.url}: {reason}")
        endpoint.answered()
        try:
            return wire.decode_answer(answer, self.name, part.num_rows)
        except wire.Malformed as error:
            raise Refused(f"{endpoint.url}: {error}: {answer[:80]!r}") from None


def _retry_after(response: httpx.Response) -> float:
    try:
        return min(max(float(response.headers.get("retry-after", 0)), 0.0), COOL_DOWN_S)
    except ValueError:
        return 0.0


def _join(
    reward: str, found: list[tuple[dict, list]], num_rows: list[int]
) -> dict[str, np.ndarray]:
    """Put the parts' columns together; NaN where a server left one out."""
    names = dict.fromkeys([reward, *(name for scores, _ in found for name in scores)])
    blank = [np.full(count, np.nan) for count in num_rows]
    return {
        name: np.concatenate([s.get(name, b) for (s, _), b in zip(found, blank, strict=True)])
        for name in names
    }
