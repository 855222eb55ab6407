"""A reward behind HTTP (flow_grpo/reward_server), called as every scorer is.

Every wait ends: a call has one deadline for its connections, uploads, answers and retries.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    RetryError,
    retry_if_exception_type,
    wait_random_exponential,
)

from flow_grpo.rewards.base import Reward
from flow_grpo.rewards.batch import Batch, scatter
from flow_grpo.rewards.remote import health, wire
from flow_grpo.rewards.remote.exchange import Loop, Refused, Retry, connect, detail, send
from flow_grpo.rewards.remote.servers import Servers, SomeFailed

PART_ROWS, PART_BYTES = 64, 2**26  # of a request, unless a group is larger
BACKOFF_S, MAX_BACKOFF_S = 0.25, 15.0
SLOTS = 32  # requests of a process at a time to each URL
MAX_SCORER_FAILURES = 3  # answers of 500, which say that the scorer itself failed
COOL_DOWN_S = 30.0  # after a call in vain, calls fail at once for so long
Part = tuple[int, bytes]  # of a call: how many rows, and a request's body
Answer = tuple[dict[str, np.ndarray], list[str | None]]  # scores, and each row's error


class Unavailable(Refused):
    """No server answered before the deadline."""


@dataclass(eq=False)
class _Endpoint:
    url: str
    num_in_flight: int = 0
    num_failures: int = 0  # since it last answered
    avoid_until: float = 0.0  # on the client's clock

    def failed(self, error: Retry, now: float) -> None:
        if error.status != 429:  # that is a healthy server's
            self.num_failures += 1
        pause_s = min(BACKOFF_S * 2 ** min(self.num_failures, 7), COOL_DOWN_S)
        self.avoid_until = now + max(pause_s, error.after_s)

    def answered(self) -> None:
        self.num_failures, self.avoid_until = 0, 0.0


class RemoteReward(Reward):
    """Scores by HTTP: groups stay whole, and the parts of a call are spread over the URLs.

    Once a deadline has passed in vain the circuit is open: calls fail at once for COOL_DOWN_S, then
    a URL has to be healthy before anything is sent.
    """

    def __init__(
        self,
        name: str,
        servers: Servers,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):
        self.name, self.servers = name, servers
        self._clock, self._sleep = clock, sleep
        self._endpoints = [_Endpoint(url) for url in servers.urls[name]]
        self._open_until, self._last_error = 0.0, ""  # 0: the circuit is closed
        self._slots = asyncio.Semaphore(SLOTS * len(self._endpoints))
        secure = any(url.startswith("https:") for urls in servers.urls.values() for url in urls)
        self._loop = Loop("reward-http", connect(servers.token, secure))
        self._closed = False

    def __call__(self, batch: Batch) -> dict[str, np.ndarray]:
        """Raises Refused, Unavailable or SomeFailed, at the latest at the deadline."""
        if self._closed:
            raise Refused(f"{self._endpoints[0].url}: the run is ending")
        rows = self._split(batch)
        parts = [(len(r), wire.encode(batch.rows(r), self.servers.encoding)) for r in rows]
        patience_s = self.servers.timeout_s + 2 * health.HEALTH_S
        try:
            answers = self._loop.run(self._score(parts), patience_s)
        except TimeoutError:
            raise Unavailable(
                f"{self._endpoints[0].url}: {len(batch)} images still wait for their turn after "
                f"config.reward_timeout={self.servers.timeout_s:g} s"
            ) from None
        scores = scatter(zip(rows, (part for part, _ in answers), strict=True), len(batch))
        errors = [error for _, part in answers for error in part]
        failed = [row for row, error in enumerate(errors) if error is not None]
        if failed:
            raise SomeFailed(
                f"{', '.join(e.url for e in self._endpoints)}: {len(failed)} of {len(errors)} rows "
                f"have errors; row {failed[0]}: {errors[failed[0]][:300]}",
                scores,
            )
        return scores

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.close()

    def _split(self, batch: Batch) -> list[list[int]]:
        """Rows of each request: whole groups, and at least a request for each URL if possible."""
        num_rows = min(PART_ROWS, -(-len(batch) // len(self._endpoints)))
        num_rows = min(num_rows, PART_BYTES * len(batch) // max(1, batch.num_bytes()))
        return wire.cut(batch, num_rows)

    async def _score(self, parts: list[Part]) -> list[Answer]:
        """Send all parts at once; the first one in vain ends the others."""
        deadline = self._clock() + self.servers.timeout_s
        if self._open_until:
            await self._probe()
        tasks = [asyncio.ensure_future(self._send(part, deadline)) for part in parts]
        try:
            answers = await asyncio.gather(*tasks)
        except Unavailable as error:
            self._open_until, self._last_error = self._clock() + COOL_DOWN_S, str(error)
            raise
        finally:
            for task in tasks:
                task.cancel()
        self._open_until = 0.0
        return answers

    async def _probe(self) -> None:
        """With the circuit open, raise Unavailable until a URL is healthy again."""
        if self._clock() < self._open_until:
            raise Unavailable(f"{self._last_error} (not tried again within {COOL_DOWN_S:g} s)")
        answers = await asyncio.to_thread(health.ask, self.servers, [self.name])
        problems = [answer.problem for answer in answers.values()]
        if all(problems):
            self._open_until = self._clock() + COOL_DOWN_S
            raise Unavailable(problems[0])

    async def _send(self, part: Part, deadline: float) -> Answer:
        """Send a part until it is answered, always under one id, with growing, random pauses.

        Another try is worth it after a Retry alone: see send().
        """
        headers = {"content-type": wire.CONTENT_TYPE, "idempotency-key": uuid.uuid4().hex}
        num_scorer_failures = 0

        def too_late(state: RetryCallState) -> bool:  # for one more
            return state.upcoming_sleep > 0.7 * (deadline - self._clock())

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Retry), wait=_pause, stop=too_late, sleep=self._sleep
        )
        try:
            async for attempt in retrying:
                with attempt:
                    try:
                        return await self._attempt(part, headers, deadline)
                    except Retry as error:
                        num_scorer_failures += error.status == 500
                        if num_scorer_failures == MAX_SCORER_FAILURES:
                            raise Refused(f"{error.url}: {error}") from None
                        raise
        except RetryError as error:
            last = error.last_attempt
            raise Unavailable(
                f"{last.exception().url}: no scores after {last.attempt_number} attempt(s) within "
                f"config.reward_timeout={self.servers.timeout_s:g} s; the last: {last.exception()}"
            ) from None

    async def _attempt(self, part: Part, headers: dict[str, str], deadline: float) -> Answer:
        """Send a part to the URL that failed least recently and has least to do."""
        num_rows, body = part
        async with self._slots:
            now = self._clock()
            endpoint = min(
                self._endpoints, key=lambda e: (max(e.avoid_until, now), e.num_in_flight)
            )
            # Half of the rest: a retry finds the result of an attempt that was only slow.
            patience_s = (deadline - now) / 2
            endpoint.num_in_flight += 1
            try:
                status, answer = await send(
                    self._loop.client, endpoint.url, body, headers, patience_s, num_rows
                )
            except Retry as error:
                endpoint.failed(error, self._clock())
                raise
            finally:
                endpoint.num_in_flight -= 1
        endpoint.answered()
        if status == 422:
            return {self.name: np.full(num_rows, np.nan)}, [detail(answer)] * num_rows
        try:
            return wire.decode_answer(answer, self.name, num_rows)
        except wire.Malformed as error:
            raise Refused(f"{endpoint.url}: {error}: {answer[:80]!r}") from None


_BACKOFF = wait_random_exponential(2 * BACKOFF_S, MAX_BACKOFF_S, min=BACKOFF_S)


def _pause(state: RetryCallState) -> float:
    return max(_BACKOFF(state), state.outcome.exception().after_s)
