"""A vision-language model as a judge, behind an OpenAI-style endpoint (sglang, vLLM, any other)."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
from PIL import Image

from flow_grpo.rewards.base import Reward, only_pictures

NUM_ATTEMPTS, BACKOFF_S = 4, 0.5  # the wait doubles from one attempt to the next
RETRIED = (408, 429, 500, 502, 503, 504)
MAX_TOKENS, MAX_BYTES = 2048, 2**20  # of an answer
TEMPLATES = Path(__file__).parent / "templates"


class Question(NamedTuple):
    pictures: Sequence[np.ndarray]  # uint8 (H, W, 3)
    text: str


class Judge:
    """Asks one endpoint `concurrency` questions at a time. timeout_s: of one, retries included."""

    def __init__(self, url: str, model: str, concurrency: int, timeout_s: float):
        key = os.environ.get("FLOW_GRPO_JUDGE_KEY")
        self.url, self.model, self.timeout_s = url.rstrip("/"), model, timeout_s
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=concurrency),
            trust_env=False,  # no proxy between machines of one network
        )
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="judge")

    def ask(self, questions: Sequence[Question]) -> list[str | None]:
        """Return the answers, None for a question that got none.

        Raises ConnectionError, naming the URL and the last reason, if no question got one.
        """
        answers = list(self._threads.map(self._ask, questions))
        if answers and all(isinstance(answer, Exception) for answer in answers):
            raise ConnectionError(
                f"the judge {self.model!r} at {self.url} answered none of {len(answers)} "
                f"questions: {answers[-1]!r}"
            )
        return [None if isinstance(answer, Exception) else answer for answer in answers]

    def _ask(self, question: Question) -> str | Exception:
        request = {
            "model": self.model,
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "messages": [{"role": "user", "content": _content(question)}],
        }
        deadline = time.monotonic() + self.timeout_s
        for attempt in range(NUM_ATTEMPTS):
            try:
                return _text(self._post(request, deadline))
            except httpx.HTTPStatusError as error:
                failure = error
                if error.response.status_code not in RETRIED:
                    break
            except httpx.TransportError as error:
                failure = error
            except (httpx.HTTPError, ValueError, TimeoutError) as error:
                return error
            pause = BACKOFF_S * 2**attempt * random.uniform(0.5, 1.5)
            if attempt + 1 == NUM_ATTEMPTS or time.monotonic() + pause > deadline:
                break
            time.sleep(pause)
        return failure

    def _post(self, request: dict, deadline: float) -> bytes:
        """Return the answer's body. Raises TimeoutError, ValueError or httpx.HTTPError."""
        left = max(0.001, deadline - time.monotonic())
        body = b""
        url = f"{self.url}/chat/completions"
        with self._client.stream("POST", url, json=request, timeout=left) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                body += chunk
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no complete answer in {self.timeout_s:g} s")
                if len(body) > MAX_BYTES:
                    raise ValueError(f"an answer of more than {MAX_BYTES} bytes")
        return body

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._client.close()


def _content(question: Question) -> list[dict]:
    parts = []
    for picture in question.pictures:
        buffer = BytesIO()
        Image.fromarray(picture).save(buffer, format="PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    return [*parts, {"type": "text", "text": question.text}]


def _text(body: bytes) -> str:
    """Take the message out of an answer. Raises ValueError if there is none."""
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (LookupError, TypeError) as error:
        raise ValueError(f"no message in the answer ({error!r})") from error
    if not isinstance(text, str):
        raise ValueError(f"a message of {type(text).__name__}")
    return text


class JudgeReward(Reward):
    """Score each picture by the last number that `pattern` finds in a judge's answer.

    NaN where there is no answer or no number in range; `<name>_unanswered` and `<name>_unparsed`
    count these. config.rewards has <endpoint>_url and <endpoint>_model.
    """

    name: str  # of the reward and its template
    endpoint: str
    pattern: str  # one group, the number
    lowest: float
    highest: float  # scores are divided by it

    @classmethod
    def check(cls, settings, prompts, metadata) -> None:
        url = settings[f"{cls.endpoint}_url"]
        if not re.match(r"https?://[^/\s]+", url):
            raise ValueError(
                f"config.rewards.{cls.endpoint}_url={url!r}: an endpoint such as "
                f"http://127.0.0.1:17140/v1 is needed."
            )
        cls.template(settings)

    @classmethod
    def template(cls, settings) -> str:
        """Read the text of the question. Raises ValueError if it has no place for the prompt."""
        own = Path(settings["judge_templates"] or TEMPLATES) / f"{cls.name}.txt"
        path = own if own.is_file() else TEMPLATES / own.name
        text = path.read_text(encoding="utf-8").strip()
        if "{prompt}" not in text:
            raise ValueError(f"{path} has no {{prompt}}: the judge must see the prompt.")
        return text

    def __init__(self, settings, device):
        self.question = self.template(settings)
        self.judge = Judge(
            settings[f"{self.endpoint}_url"],
            settings[f"{self.endpoint}_model"],
            settings["judge_concurrency"],
            settings["judge_timeout_s"],
        )

    def __call__(self, images, prompts, metadata, references=None, group=None) -> dict:
        pairs = zip(only_pictures(images, self.name), prompts, strict=True)
        answers = self.judge.ask([Question([image], self.about(text)) for image, text in pairs])
        scores = np.array([self.parse(answer) for answer in answers])
        unanswered = np.array([answer is None for answer in answers])
        return {
            self.name: scores,
            f"{self.name}_unanswered": unanswered,
            f"{self.name}_unparsed": np.isnan(scores) & ~unanswered,
        }

    def about(self, prompt: str) -> str:
        """Return the text of the question about a prompt."""
        return self.question.replace("{prompt}", prompt)

    def parse(self, answer: str | None) -> float:
        """Return the score in an answer, NaN if it has none."""
        found = re.findall(self.pattern, answer or "", re.IGNORECASE)
        value = float(found[-1]) if found else np.nan
        return value / self.highest if self.lowest <= value <= self.highest else np.nan

    def close(self) -> None:
        self.judge.close()
