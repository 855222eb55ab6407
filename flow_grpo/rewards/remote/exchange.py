"""One HTTP exchange with a reward server, and what its answer means for the next one."""

from __future__ import annotations

import asyncio
import json

import httpx

from flow_grpo.rewards.remote.servers import Servers

MAX_ANSWER_BYTES = 2**26
MAX_RETRY_AFTER_S = 30.0
BUSY = (408, 429, 502, 503, 504)  # an answer with one of these is worth another try


class Refused(RuntimeError):
    """A server answered, but not with scores. The message begins with the URL."""


class Retry(Exception):
    """An attempt came to nothing, and another may succeed."""

    def __init__(self, url: str, reason: str, status: int = 0, after_s: float = 0.0):
        super().__init__(reason)
        self.url, self.status, self.after_s = url, status, after_s


def connect(servers: Servers) -> httpx.AsyncClient:
    """Without a timeout of its own: send() bounds a whole attempt. No proxy, no redirects."""
    headers = {"accept-encoding": "identity"}
    if servers.token:
        headers["authorization"] = f"Bearer {servers.token}"
    secure = any(url.startswith("https:") for urls in servers.urls.values() for url in urls)
    return httpx.AsyncClient(
        timeout=None,
        trust_env=False,
        headers=headers,
        verify=secure,  # if not, no certificates are loaded: that takes half a second
    )


async def send(
    client: httpx.AsyncClient, url: str, body: bytes, headers: dict[str, str], patience_s: float
) -> tuple[int, bytes]:
    """Post to a server's /score; return status and answer. Raises Retry or Refused.

    The status is 200, or 422: none of the rows can be scored.
    """
    try:
        response, answer = await asyncio.wait_for(_post(client, url, body, headers), patience_s)
    except TimeoutError:
        raise Retry(url, f"no answer within {patience_s:.3g} s") from None
    except httpx.TransportError as error:
        raise Retry(url, f"{type(error).__name__}: {error}") from None
    status = response.status_code
    if status in (200, 422):
        return status, answer
    reason = f"status {status}: {detail(answer)}"
    if status in (500, *BUSY):
        raise Retry(url, reason, status, _retry_after(response))
    raise Refused(f"{url}: {reason}")


async def _post(
    client: httpx.AsyncClient, url: str, body: bytes, headers: dict[str, str]
) -> tuple[httpx.Response, bytes]:
    """Return a response and its body, of which no more is read than an answer may have."""
    answer = bytearray()
    async with client.stream("POST", f"{url}/score", content=body, headers=headers) as response:
        async for chunk in response.aiter_raw():
            answer += chunk
            if len(answer) > MAX_ANSWER_BYTES:
                raise Refused(f"{url}: the answer has more than {MAX_ANSWER_BYTES} bytes")
    return response, bytes(answer)


def detail(answer: bytes) -> str:
    """What FastAPI or anyone else says of an error, shortened."""
    try:
        return str(json.loads(answer)["detail"])[:300]
    except (ValueError, RecursionError, LookupError, TypeError):
        return repr(answer[:80])


def _retry_after(response: httpx.Response) -> float:
    try:
        return min(max(float(response.headers.get("retry-after", 0)), 0.0), MAX_RETRY_AFTER_S)
    except ValueError:
        return 0.0
