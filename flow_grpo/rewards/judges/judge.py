"""A vision-language model as a judge; judges/chat.py asks it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from flow_grpo import inputs
from flow_grpo.rewards.base import Reward, check_package, only_images
from flow_grpo.rewards.batch import Batch

TEMPLATES = Path(__file__).parent / "templates"


class JudgeReward(Reward):
    """Score each image by the last number that `pattern` finds in a judge's answer.

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
        for package in ("httpx", "tenacity"):
            check_package(package, "rewards")
        cls.template(settings)

    @classmethod
    def template(cls, settings) -> str:
        """Read the text of the question. Raises ValueError if it has no place for the prompt."""
        own = Path(settings["judge_templates"] or TEMPLATES) / f"{cls.name}.txt"
        path = own if own.is_file() else TEMPLATES / own.name
        text = inputs.text(path).strip()
        if "{prompt}" not in text:
            raise ValueError(f"{path} has no {{prompt}}: the judge must see the prompt.")
        return text

    def __init__(self, settings, device):
        from flow_grpo.rewards.judges.chat import Chat  # httpx is an extra

        self.question = self.template(settings)
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
        found = re.findall(self.pattern, answer or "", re.IGNORECASE)
        value = float(found[-1]) if found else np.nan
        return value / self.highest if self.lowest <= value <= self.highest else np.nan

    def close(self) -> None:
        self.judge.close()
