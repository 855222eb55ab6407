"""Questions of one's own, and those of an editing judge, which sees the reference images too."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from flow_grpo import inputs
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.judges.judge import template
from flow_grpo.rewards.judges.probability import Question
from flow_grpo.rewards.judges.vqa import ProbabilityReward, geometric

OTHERS = {"yes": ["no"], "no": ["yes"]}
KINDS = ("followed", "preserved", "quality")
TAKEN = ("unanswered", "unparsed", "low", "high", "missing")  # by columns beside a score


class Rubric(ProbabilityReward):
    """Score the weighted mean of the probabilities of answers to questions of one's own.

    `rewards.rubric`: a jsonl of {"question": "... {prompt} ...", "answer": "yes", "others":
    ["no"], "weight": 1, "name": "hands", "references": false}. Others are weighed against the
    answer; none: all tokens (of yes and no: each other). Where "references" is true the row's
    reference images are shown first. `rubric_<name>` has a question's own probability.
    """

    name = "rubric"

    @classmethod
    def check(cls, settings, prompts, metadata) -> None:
        super().check(settings, prompts, metadata)
        if any(each["references"] for each in read_rubric(settings["rubric"])):
            check_references(prompts, metadata)

    def __init__(self, settings, device):
        self.rows = read_rubric(settings["rubric"])
        super().__init__(settings, device)

    def questions(self, image, batch, row) -> list[Question]:
        return [
            Question(
                shown(image, batch, row) if each["references"] else (image,),
                each["question"].replace("{prompt}", batch.prompts[row]),
                each["answer"],
                tuple(each["others"]),
            )
            for each in self.rows
        ]

    def columns(self, found, batch) -> dict:
        table, weights = np.stack(found), [each["weight"] for each in self.rows]
        columns = {self.name: np.average(table, axis=1, weights=weights)}
        named = [(each["name"], n) for n, each in enumerate(self.rows) if each["name"]]
        return columns | {f"{self.name}_{name}": table[:, n] for name, n in named}


class Editing(ProbabilityReward):
    """Score the geometric mean of P(yes) against no: instruction followed, rest kept, no flaws.

    So that an edit that ignores the instruction, or all but it, is not saved by being beautiful.
    `editing_<kind>` has each one.
    """

    name = "editing"

    @classmethod
    def check(cls, settings, prompts, metadata) -> None:
        super().check(settings, prompts, metadata)
        check_references(prompts, metadata)
        for kind in KINDS:
            template(settings, f"{cls.name}_{kind}")

    def __init__(self, settings, device):
        self.texts = [template(settings, f"{self.name}_{kind}") for kind in KINDS]
        super().__init__(settings, device)

    def questions(self, image, batch, row) -> list[Question]:
        images, prompt = shown(image, batch, row), batch.prompts[row]
        texts = [text.replace("{prompt}", prompt) for text in self.texts]
        return [Question(images, text, "yes", ("no",)) for text in texts]

    def columns(self, found, batch) -> dict:
        table = np.stack(found)
        columns = {f"{self.name}_{kind}": table[:, n] for n, kind in enumerate(KINDS)}
        return {self.name: [*map(geometric, table)]} | columns


def shown(image: np.ndarray, batch: Batch, row: int) -> tuple[np.ndarray, ...]:
    """Return a row's reference images, and what was made of them last. Raises ValueError."""
    if not (batch.references and batch.references[row]):
        raise ValueError("an image without a reference can't be compared with it")
    return (*batch.references[row], image)


def check_references(prompts, metadata) -> None:
    for prompt, row in zip(prompts, metadata, strict=True):
        if not row.get("image"):
            raise ValueError(
                f"the prompt {prompt!r:.60} has no reference image. A data set whose rows have an "
                f'"image" is needed.'
            )


def read_rubric(path: str) -> list[dict]:
    """Read a rubric's rows, all keys set. Raises ValueError naming file, line and fault."""
    if not Path(path).is_file():
        raise ValueError(
            f"config.rewards.rubric={path!r}: there is no such file. A jsonl with a "
            f'{{"question": ..., "answer": "yes"}} a line is needed.'
        )
    rows = []
    for where, row in inputs.json_lines(Path(path)):
        answer = row.get("answer", "yes") if isinstance(row, dict) else None
        others = list(OTHERS.get(str(answer).lower(), ()))
        full = {"answer": "yes", "others": others, "weight": 1, "name": "", "references": False}
        kinds = {"question": str, "answer": str, "others": list, "weight": (int, float)}
        kinds |= {"name": str, "references": bool}
        full |= row if isinstance(row, dict) else {}
        wrong = [key for key, kind in kinds.items() if not isinstance(full.get(key), kind)]
        wrong += sorted(full.keys() - kinds.keys())
        if not wrong:
            named = re.fullmatch(r"\w{0,60}", full["name"]) and full["name"] not in TAKEN
            fine = {"weight": full["weight"] > 0, "name": named}
            fine["others"] = all(isinstance(each, str) for each in full["others"])
            wrong = [key for key, is_fine in fine.items() if not is_fine]
        if wrong:
            raise ValueError(
                f'{where}: {", ".join(wrong)} of {row!r:.80}: needed are a "question", and as one '
                f'likes "answer" (a word), "others" (words), "weight" (above 0), "name" (letters, '
                f'digits and _) and "references" (true or false).'
            )
        rows.append(full)
    names = [row["name"] for row in rows if row["name"]]
    if not rows or len(set(names)) < len(names):
        raise ValueError(f"config.rewards.rubric={path!r}: it has no rows, or a name twice.")
    return rows
