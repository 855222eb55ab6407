"""The probability of an answer, as a vision-language model gives it to the first word it would say.

VQAScore (arXiv:2404.01291) and Soft-TIFA (arXiv:2512.16853) are made of such probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

TOP = 20  # tokens that an endpoint lists: vLLM's and OpenAI's most
WANTS = {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP}
MOST_UNSEEN = 0.01  # of a share; what is not listed is less likely than the last that is
NUMBERS = "zero one two three four five six seven eight nine ten".split()


class Question(NamedTuple):
    images: tuple[np.ndarray, ...]  # uint8 (H, W, 3), in the order in which they are shown
    text: str
    answer: str  # a word that is one token of the model's
    others: tuple[str, ...] = ()  # answers beside which it is weighed; none: beside all tokens


def forms(answers: Iterable[str]) -> set[str]:
    """Return the tokens that count as one of these: cases, a space before, a number's digit."""
    words = {word for a in answers for word in (a, a.lower(), a.capitalize())}
    words |= {str(NUMBERS.index(word)) for word in words & {*NUMBERS}}
    return words | {f" {word}" for word in words}


def share(listed: Sequence[tuple[str, float]], answer: str, others: Sequence[str] = ()) -> float:
    """Return an answer's probability among all tokens, or beside `others` alone.

    listed: the likeliest tokens with their log-probabilities. NaN where the answer is not listed
    (without others), or where what is not listed could move the share by more than MOST_UNSEEN.
    """
    counted = [forms([one]) for one in (answer, *others)]
    masses = [sum(math.exp(each) for token, each in listed if token in of) for of in counted]
    if not others or not sum(masses):
        return masses[0] if masses[0] else math.nan
    num_unseen = len(set().union(*counted) - {token for token, _ in listed})
    unseen = num_unseen * math.exp(min(each for _, each in listed))
    return math.nan if unseen > MOST_UNSEEN * sum(masses) else masses[0] / sum(masses)


def first_token(choice: dict) -> list[tuple[str, float]]:
    """Read the tokens that an endpoint lists; [] of one that refused or said nothing."""
    if choice.get("finish_reason") == "content_filter" or choice["message"].get("refusal"):
        return []
    if choice.get("logprobs") is None:
        raise ValueError("it has no logprobs, which the endpoint must give")
    content = choice["logprobs"]["content"]
    return (
        [(e["token"], float(e["logprob"])) for e in content[0]["top_logprobs"]] if content else []
    )
