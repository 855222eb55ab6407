"""A vision-language model as a judge; judges/chat.py asks it."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

from flow_grpo import inputs
from flow_grpo.cli import redacted
from flow_grpo.rewards.base import Reward, Settings, check_package, only_images
from flow_grpo.rewards.batch import Batch

TEMPLATES = Path(__file__).parent / "templates"


MOST = 100  # characters in which a number is looked for
DIGITS = r"\d+(?:\.\d+)?"
# A number behind a colon, emphasis and the scale in brackets; and what comes after it.
_NUMBER = re.compile(
    rf"""[\s*_#"'`|]* (?:[-–—]\s)? [\s:=*_#"'`|]*  (?P<scale>[(\[][^()\[\]]*[)\]][\s:=*_]*)?
    (?:[(\[{{"'~≈]|<(?=[\d.]+>))?\s*
    (?P<sign>[-–—−])? \+?(?P<number>{DIGITS}|\.\d+) (?P<rest>.*)""",
    re.VERBOSE | re.DOTALL,
)
_OVER = re.compile(rf"[ *_]*(?:/|(?:out )?of\b)[ *_]*({DIGITS})(.*)", re.DOTALL | re.IGNORECASE)
_NOTE = re.compile(rf"[ *_]*[(\[][^()\[\]]*?(?:[-–—−/]|to|of)\s*({DIGITS})\D*[)\]]", re.IGNORECASE)
# What makes it another number or one of several: 4th, 40 %, 1,5, 4.5.1, 3 4, 3-4, 3 to 4, 3 + 1.
_MORE = re.compile(
    r"[^\W_]|[ *_]*%|[.,]+\d|[^\S\n]+[-+.]?\d"
    r"|[^\S\n]*(?:[-–—−~/+*×=:^,;&|]|(?:to|or|and|(?:out )?of)\b)[ *_]*[-+.]?\d",
    re.IGNORECASE,
)


def number(text: str, highest: float) -> float | None:
    """Return the number with which a text begins, or the numerator of a fraction.

    None: it begins with none. NaN: with a negative one, one on another scale than that to
    `highest`, or with several, such as a range.
    """
    if not (found := _NUMBER.match(text[:MOST])):
        return None
    scales, rest = re.findall(DIGITS, found["scale"] or "")[-1:], found["rest"]
    if over := _OVER.match(rest):
        scales, rest = [*scales, over[1]], over[2]
    if note := _NOTE.match(rest):
        scales.append(note[1])
    listed = "\n" in text[: found.start("number")] and re.match(r"[.)][ \t]+\S", rest)  # "1. It"
    other = any(float(scale) != highest for scale in scales)
    wrong = found["sign"] or listed or other or _MORE.match(rest)
    return math.nan if wrong else float(found["number"])


def check_endpoint(settings: Settings, name: str) -> None:
    """Raise ValueError unless config.rewards.<name>_url can be asked from here."""
    url = settings[f"{name}_url"]
    if not re.fullmatch(r"https?://[^/\s?#@]+(/[^\s?#@]*)?", url):
        raise ValueError(
            f"config.rewards.{name}_url={redacted(url)!r}: an endpoint such as "
            f"http://127.0.0.1:17140/v1 is needed. A key is read from FLOW_GRPO_JUDGE_KEY, and "
            f"from no URL: a run writes these into its files."
        )
    for package in ("httpx", "tenacity"):
        check_package(package, "rewards")


def template(settings: Settings, name: str) -> str:
    """Read the text of a question. Raises ValueError if it has no place for the prompt."""
    own = Path(settings["judge_templates"] or TEMPLATES) / f"{name}.txt"
    path = own if own.is_file() else TEMPLATES / own.name
    text = inputs.text(path).strip()
    if "{prompt}" not in text:
        raise ValueError(f"{path} has no {{prompt}}: the judge must see the prompt.")
    return text


class JudgeReward(Reward):
    """Score each image by the number that follows `pattern`, where it is last, in an answer.

    NaN where there is no answer, no number in range, or several, such as 3-4;
    `<name>_unanswered` and `<name>_unparsed` count these. config.rewards has <endpoint>_url and
    <endpoint>_model.
    """

    name: str  # of the reward and its template
    endpoint: str
    pattern: str  # one group: a text that begins with the number, or with its scale
    lowest: float
    highest: float  # scores are divided by it

    @classmethod
    def check(cls, settings, prompts, metadata) -> None:
        check_endpoint(settings, cls.endpoint)
        template(settings, cls.name)

    def __init__(self, settings, device):
        from flow_grpo.rewards.judges.chat import Chat  # httpx is an extra

        self.question = template(settings, self.name)
        self.judge = Chat(
            settings[f"{self.endpoint}_url"],
            settings[f"{self.endpoint}_model"],
            settings["judge_concurrency"],
            settings["judge_timeout_s"],
        )

    def __call__(self, batch: Batch) -> dict:
        pairs = zip(only_images(batch.images, self.name), batch.prompts, strict=True)
        answers = self.judge.ask([([image], self.about(text)) for image, text in pairs])
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
        texts = re.findall(self.pattern, answer or "", re.IGNORECASE | re.DOTALL)
        values = [value for text in texts if (value := number(text, self.highest)) is not None]
        value = values[-1] if values else np.nan
        return value / self.highest if self.lowest <= value <= self.highest else np.nan

    def close(self) -> None:
        self.judge.close()
