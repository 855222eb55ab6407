"""One HTTP exchange, all of it within one deadline, and what a reward server's answer means."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import httpx

from flow_grpo.rewards.remote import wire
from flow_grpo.rewards.remote.bounded import Malformed, TooLarge, loads

MAX_ANSWER_BYTES = 2**26
MAX_RETRY_AFTER_S = 30.0
CLOSE_S = 5.0
BUSY = (408, 429, 502, 503, 504)  # an answer with one of these is worth another try
T = TypeVar("T")


class Refused(RuntimeError):
    """A server answered, but not with scores. The message begins with the URL."""


class Retry(Exception):
    """An attempt came to nothing, and another may succeed."""

    def __init__(self, url: str, reason: str, status: int = 0, after_s: float = 0.0):
        super().__init__(reason)
        self.url, self.status, self.after_s = url, status, after_s


class Loop:
    """An event loop in a daemon thread, for callers that have none, and the client it serves."""

    def __init__(self, name: str, client: httpx.AsyncClient):
        self.client, self._loop = client, asyncio.new_event_loop()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def run(self, work: Coroutine[Any, Any, T], patience_s: float) -> T:
        """Wait for what the loop does. Raises TimeoutError, and ends it then."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(patience_s)
        except TimeoutError:
            future.cancel()
            raise

    def close(self) -> None:
        async def end() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.client.aclose()

        with suppress(TimeoutError):
            self.run(end(), CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _work(self) -> None:
        self._loop.run_forever()
        self._loop.close()


def connect(token: str, secure: bool, num_connections: int | None = None) -> httpx.AsyncClient:
    """Without a timeout of its own: fetch() bounds a whole exchange. No proxy, no redirects.

    secure: for https; without it no certificates are loaded, which takes half a second.
    """
    headers = {"accept-encoding": "identity"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    return httpx.AsyncClient(
        timeout=None,
        trust_env=False,
        headers=headers,
        verify=secure,
        limits=httpx.Limits(max_connections=num_connections),
    )


async def fetch(
    client: httpx.AsyncClient,
    method: str,
    url: str,
    most_bytes: int,
    patience_s: float,
    late: Callable[[], bool] = lambda: False,
    **request: Any,
) -> tuple[httpx.Response, bytes]:
    """Send a request; return the answer and its body, packed as it came.

    patience_s: for all of it, from resolving the name to the last byte. late: asked at every piece
    whether another clock says the same. Raises TimeoutError, httpx.HTTPError, or ValueError for
    more than most_bytes.
    """

    async def read() -> tuple[httpx.Response, bytes]:
        answer = bytearray()
        async with client.stream(method, url, **request) as response:
            async for chunk in response.aiter_raw():
                answer += chunk
                if late():
                    raise TimeoutError
                if len(answer) > most_bytes:
                    raise ValueError(f"the answer has more than {most_bytes} bytes")
        return response, bytes(answer)

    return await asyncio.wait_for(read(), patience_s)


async def send(
    client: httpx.AsyncClient,
    url: str,
    body: bytes,
    headers: dict[str, str],
    patience_s: float,
    num_rows: int,
) -> tuple[int, bytes]:
    """Post so many rows to a server's /score; return status and answer. Raises Retry or Refused.

    The status is 200, or 422: none of the rows can be scored.
    """
    most = min(MAX_ANSWER_BYTES, wire.max_answer_bytes(num_rows))
    post = {"content": body, "headers": headers}
    try:
        response, answer = await fetch(client, "POST", f"{url}/score", most, patience_s, **post)
    except TimeoutError:
        raise Retry(url, f"no answer within {patience_s:.3g} s") from None
    except httpx.TransportError as error:
        raise Retry(url, f"{type(error).__name__}: {error}"[:300]) from None
    except ValueError as error:
        raise Refused(f"{url}: {error}") from None
    status = response.status_code
    if status in (200, 422):
        return status, answer
    reason = f"status {status}: {detail(answer)}"
    if status in (500, *BUSY):
        raise Retry(url, reason, status, _retry_after(response))
    raise Refused(f"{url}: {reason}")


def detail(answer: bytes) -> str:
    """What FastAPI or anyone else says of an error, shortened."""
    try:
        return str(loads(answer, 1000)[0]["detail"])[:300]
    except (Malformed, TooLarge, LookupError, TypeError):
        return repr(answer[:80])


def _retry_after(response: httpx.Response) -> float:
    try:
        after_s = float(response.headers.get("retry-after", 0))
    except ValueError:
        return 0.0
    return min(after_s, MAX_RETRY_AFTER_S) if after_s > 0 else 0.0  # not NaN
