"""Questions to a vision-language model behind an OpenAI-style endpoint (sglang, vLLM, any other).

Not by the package openai: it sends what OPENAI_CUSTOM_HEADERS holds, whatever its client is given.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any, Generic, TypeVar

import httpx
import numpy as np
from PIL import Image
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)

from flow_grpo.cli import redacted
from flow_grpo.rewards.remote.bounded import Malformed, TooLarge, loads
from flow_grpo.rewards.remote.exchange import Loop, connect, fetch

NUM_ATTEMPTS, BACKOFF_S = 4, 1.0  # the longest wait doubles from one attempt to the next
RETRIED = (408, 429, 500, 502, 503, 504)
MAX_TOKENS, MAX_BYTES, MAX_VALUES = 2048, 2**20, 2**14  # of an answer
WAKE_S = 1.0  # for a loop that has much to do to notice that time is up
Question = tuple[Sequence[np.ndarray], str]  # images, uint8 (H, W, 3), and the text about them
T = TypeVar("T")


class Chat(Generic[T]):
    """Asks one endpoint `concurrency` questions at a time. timeout_s: of one, retries included.

    wants: what a request says besides the question. read: what is taken out of an answer's first
    choice; it raises LookupError, TypeError or ValueError where that is not there.
    """

    def __init__(
        self,
        url: str,
        model: str,
        concurrency: int,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        wants: Mapping[str, Any] | None = None,
        read: Callable[[dict], T] | None = None,
    ):
        self._wants, self._read = wants or {"max_tokens": MAX_TOKENS}, read or said
        key = os.environ.get("FLOW_GRPO_JUDGE_KEY", "")
        self.url, self.model, self.timeout_s = url.rstrip("/"), model, timeout_s
        self._clock, self._sleep = clock, sleep
        self._loop = Loop("judge-http", connect(key, self.url.startswith("https:"), concurrency))
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="judge")

    def ask(self, questions: Sequence[Question]) -> list[T | None]:
        """Return the answers, None for a question that got none.

        Raises ConnectionError, naming the URL and the last reason, if no question got one.
        """
        answers = list(self._threads.map(self._ask, questions))
        if answers and all(isinstance(answer, Exception) for answer in answers):
            raise ConnectionError(
                redacted(
                    f"the judge {self.model!r} at {self.url} answered none of {len(answers)} "
                    f"questions: {answers[-1]!r:.500}"
                )
            )
        return [None if isinstance(answer, Exception) else answer for answer in answers]

    def _ask(self, question: Question) -> T | Exception:
        request = {
            "model": self.model,
            "temperature": 0,
            **self._wants,
            "messages": [{"role": "user", "content": _content(*question)}],
        }
        deadline = self._clock() + self.timeout_s

        def too_late(state: RetryCallState) -> bool:
            return self._clock() + state.upcoming_sleep > deadline

        retrying = Retrying(
            retry=retry_if_exception(_may_succeed),
            wait=wait_random_exponential(BACKOFF_S, min=BACKOFF_S / 2),
            stop=stop_after_attempt(NUM_ATTEMPTS) | too_late,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            return self._taken(retrying(self._post, request, deadline))
        except (httpx.HTTPError, ValueError, TimeoutError) as error:
            return error

    def _post(self, request: dict, deadline: float) -> bytes:
        """Return the answer's body. Raises TimeoutError, ValueError or httpx.HTTPError."""
        left = max(0.001, deadline - self._clock())
        exchange = fetch(
            self._loop.client,
            "POST",
            f"{self.url}/chat/completions",
            MAX_BYTES,
            left,
            lambda: self._clock() > deadline,
            json=request,
        )
        try:
            response, body = self._loop.run(exchange, left + WAKE_S)
        except TimeoutError:
            raise TimeoutError(f"no complete answer in {self.timeout_s:g} s") from None
        response.raise_for_status()
        return body

    def _taken(self, body: bytes) -> T:
        """Read an answer. Raises ValueError if it is none."""
        try:
            return self._read(loads(body, MAX_VALUES)[0]["choices"][0])
        except (Malformed, TooLarge, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"no message in the answer ({error!r:.300})") from error

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._loop.close()


def _may_succeed(error: BaseException) -> bool:
    """Whether another attempt may."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in RETRIED
    return isinstance(error, httpx.TransportError)


def _content(images: Sequence[np.ndarray], text: str) -> list[dict]:
    parts = []
    for image in images:
        buffer = BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    return [*parts, {"type": "text", "text": text}]


def said(choice: dict) -> str:
    """Return an answer's text; "" if it was cut, or refused."""
    text = choice["message"]["content"]
    if choice.get("finish_reason") in ("length", "content_filter"):
        return ""
    if choice["message"].get("refusal"):
        return ""
    if not isinstance(text, str):
        raise TypeError(f"a message of {type(text).__name__}")
    return text
