"""Whether the reward servers of a run are there, and what they say of their rewards."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Collection
from typing import NamedTuple
from urllib.parse import urlsplit

from flow_grpo.rewards.remote.bounded import Malformed, TooLarge, loads
from flow_grpo.rewards.remote.servers import Servers

HEALTH_S = 5.0  # for an answer to GET /health
MAX_BYTES = 2**16  # of it


class Health(NamedTuple):
    problem: str = ""  # begins with the URL; "": nothing is wrong
    compares: bool = False  # the images of a group


def check(servers: Servers, names: Collection[str] | None = None) -> set[str]:
    """Ask every server for its health and return the rewards that compare a group's images.

    names: of the rewards that are asked for; None: all. Raises ValueError naming reward and URL.
    """
    comparing = set()
    for (name, url), answer in ask(servers, servers.urls if names is None else names).items():
        if answer.problem:
            raise ValueError(
                f"config.reward_urls: the server of reward {name!r} at {answer.problem}. Start "
                f"it (python -m flow_grpo.reward_server --reward {name} --port "
                f"{urlsplit(url).port or 80}) and wait until it has loaded, or correct the URL."
            )
        if answer.compares:
            comparing.add(name)
    return comparing


def ask(servers: Servers, names: Collection[str]) -> dict[tuple[str, str], Health]:
    """Ask the URLs of these rewards, all at once, in HEALTH_S. Returns answers by reward and URL.

    In daemon threads: resolving a name takes however long it takes.
    """
    answers = {
        (name, url): Health(f"{url} does not answer within {HEALTH_S:g} s")
        for name in names
        for url in servers.urls[name]
    }
    threads = [
        threading.Thread(target=_ask, args=(answers, name, url, servers.token), daemon=True)
        for name, url in answers
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + HEALTH_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(answers)  # who is late must not change it


def _ask(answers: dict[tuple[str, str], Health], name: str, url: str, token: str) -> None:
    import httpx  # an extra, which every run with URLs has

    try:
        answers[name, url] = _judge(name, url, *asyncio.run(_get(url, token)))
    except TimeoutError:
        pass  # as is said already
    except ValueError:  # of fetch()
        more = f"more than {MAX_BYTES} bytes"
        answers[name, url] = Health(f"{url} is no reward server: GET /health gives {more}")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        answers[name, url] = Health(f"{url} does not answer ({type(error).__name__}: {error})")


async def _get(url: str, token: str) -> tuple[int, bytes]:
    """Return status and body."""
    from flow_grpo.rewards.remote import exchange

    async with exchange.connect(token, url.startswith("https:")) as client:
        response, body = await exchange.fetch(client, "GET", f"{url}/health", MAX_BYTES, HEALTH_S)
    return response.status_code, body


def _judge(name: str, url: str, status: int, body: bytes) -> Health:
    if status == 401:
        return Health(f"{url} wants another token than that of config.reward_token_file")
    try:
        found, _ = loads(body, 1000)
        reward, compares = found["reward"], found.get("compares", False)
    except (Malformed, TooLarge, LookupError, TypeError, AttributeError):
        return Health(f"{url} is no reward server: GET /health gives {body[:80]!r}")
    if status != 200:
        return Health(
            f"{url} is not healthy: status {status}, {str(found.get('detail', ''))[:300]}"
        )
    if reward != name:
        return Health(f"{url} serves another reward, {str(reward)[:80]!r}")
    return Health(compares=compares is True)
