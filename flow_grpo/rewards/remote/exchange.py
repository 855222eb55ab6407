"""One HTTP exchange with a reward server, and whether a server is there at all."""

from __future__ import annotations

import asyncio
import json
import threading

import httpx

from flow_grpo.rewards.remote.servers import Servers

HEALTH_S = 5.0  # for an answer to GET /health
MAX_ANSWER_BYTES = 2**26


class Refused(RuntimeError):
    """A server answered, but not with scores. The message begins with the URL."""


def check(servers: Servers) -> dict[str, list[str]]:
    """Ask each URL of each reward for its health, all at once, in at most HEALTH_S or so.

    Returns what is wrong with each, beginning with the URL; "" where nothing is.
    """
    pairs = [(name, url) for name, urls in servers.urls.items() for url in urls]
    found: dict[tuple[str, str], str] = {}

    async def ask() -> None:
        async with connect(servers) as client:
            problems = await asyncio.gather(*(problem(client, *pair) for pair in pairs))
            found.update(zip(pairs, problems, strict=True))

    # In a thread, as asyncio.run() waits for a name's resolver however long that takes.
    thread = threading.Thread(target=lambda: asyncio.run(ask()), daemon=True)
    thread.start()
    thread.join(HEALTH_S + 2)
    return {
        name: [found.get((name, url), f"{url} does not answer") for url in urls]
        for name, urls in servers.urls.items()
    }


async def problem(client: httpx.AsyncClient, name: str, url: str) -> str:
    """Say what is wrong with a server; "": nothing."""
    try:
        request = fetch(client, "GET", f"{url}/health", b"", {})
        response, answer = await asyncio.wait_for(request, HEALTH_S)
    except TimeoutError:
        return f"{url} does not answer within {HEALTH_S:g} s"
    except (httpx.HTTPError, httpx.InvalidURL, Refused, OSError, ValueError) as error:
        return f"{url} does not answer ({type(error).__name__}: {error})"
    if response.status_code == 401:
        return f"{url} wants another token than that of config.reward_token_file"
    try:
        found = json.loads(answer)["reward"]
    except (ValueError, RecursionError, LookupError, TypeError):
        return f"{url} is no reward server: GET /health gives {answer[:80]!r}"
    if response.status_code != 200:
        return f"{url} is not healthy: status {response.status_code}, {detail(answer)}"
    return "" if found == name else f"{url} serves another reward, {str(found)[:80]!r}"


async def fetch(
    client: httpx.AsyncClient, method: str, url: str, body: bytes, headers: dict[str, str]
) -> tuple[httpx.Response, bytes]:
    """Return a response and its body, of which no more is read than an answer may have."""
    answer = bytearray()
    async with client.stream(method, url, content=body, headers=headers) as response:
        async for chunk in response.aiter_raw():
            answer += chunk
            if len(answer) > MAX_ANSWER_BYTES:
                raise Refused(f"{url}: the answer has more than {MAX_ANSWER_BYTES} bytes")
    return response, bytes(answer)


def connect(servers: Servers) -> httpx.AsyncClient:
    """Without a timeout of its own: wait_for bounds a whole attempt. No proxy, no redirects."""
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


def detail(answer: bytes) -> str:
    """What FastAPI or anyone else says of an error, shortened."""
    try:
        return str(json.loads(answer)["detail"])[:300]
    except (ValueError, RecursionError, LookupError, TypeError):
        return repr(answer[:80])
