"""Which rewards are scored by HTTP, and where: config.reward_urls and what belongs to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from ml_collections import ConfigDict

from flow_grpo import inputs
from flow_grpo.cli import redacted
from flow_grpo.rewards.base import OURS, check_package
from flow_grpo.rewards.registry import REWARDS

MIN_TOKEN = 16  # characters


@dataclass(frozen=True)
class Servers:
    urls: Mapping[str, list[str]] = field(default_factory=dict)  # by reward
    timeout_s: float = 600.0  # of a call, its retries included
    token: str = field(default="", repr=False)
    encoding: str = "raw"

    def alone_knows(self, name: str) -> bool:
        """Tell whether there is code for a reward only at its server."""
        return name in self.urls and name not in REWARDS


class SomeFailed(RuntimeError):
    """A server scored some rows and gave errors for others; `scores` has NaN for these."""

    def __init__(self, message: str, scores: dict[str, np.ndarray]):
        super().__init__(message)
        self.scores = scores


def of(config: ConfigDict) -> Servers:
    """Read the keys. Raises ValueError naming the one at fault."""
    urls = {name: _urls(name, value) for name, value in config.reward_urls.items()}
    wanted = (*config.reward_fn, *config.eval_reward_fn)
    for name in urls:
        if name in OURS or "/" in name:
            raise ValueError(
                f"config.reward_urls: a reward can't be called {name!r}, as a column of a run's "
                f"files is called so. Rename it here, in config.reward_fn and at its server."
            )
        if name not in wanted:
            raise ValueError(
                f"config.reward_urls={redacted(config.reward_urls.to_dict())}: neither "
                f"config.reward_fn nor config.eval_reward_fn has a reward {name!r}. "
                f"Add it there, with weight 0 to monitor it, or remove the URL."
            )
    if urls:
        check_package("httpx", "rewards")
    token_file = config.reward_token_file
    token = read_token(token_file, "config.reward_token_file") if token_file and urls else ""
    return Servers(urls, config.reward_timeout, token, config.reward_encoding)


def read_token(path: str, key: str) -> str:
    """Return the token in a file. Raises ValueError. key: who names the file, for the message."""
    try:
        token = inputs.text(Path(path)).strip()
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}={path!r} can't be read: {error}.") from None
    if len(token) < MIN_TOKEN or not (token.isascii() and token.isprintable()) or " " in token:
        raise ValueError(
            f"{key}={path!r}: one line of at least {MIN_TOKEN} characters without spaces is "
            f"needed. Make one with: openssl rand -hex 32 > {path}"
        )
    return token


def _urls(name: str, value: object) -> list[str]:
    found = list(value) if isinstance(value, (list, tuple)) else [value]
    for url in found:
        try:
            parts = urlsplit(url)
            valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except (ValueError, AttributeError, TypeError):
            valid = False
        if not valid or parts.query or parts.fragment or "@" in url or not url.isprintable():
            raise ValueError(
                f"config.reward_urls: {redacted(url)!r} of {name!r} is no http://HOST:PORT, such "
                f"as http://127.0.0.1:18085. A secret belongs into config.reward_token_file."
            )
    if not found or len(set(found)) < len(found):
        raise ValueError(
            f"config.reward_urls: {name!r} has {redacted(found)!r}; one URL or several different "
            f"ones are needed, such as --config.reward_urls=\"{{'{name}': ['http://127.0.0.1:18085']}}\"."
        )
    return [url.rstrip("/") for url in found]
