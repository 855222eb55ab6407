"""Rewards that are probabilities of answers: VQAScore, Soft-TIFA, DPG-Bench."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from flow_grpo.rewards.base import Reward, Settings, check_model, only_images
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.judges.judge import check_endpoint, template
from flow_grpo.rewards.judges.probability import WANTS, Question, first_token, share

SKILLS = ("object", "attribute", "count", "position", "verb")  # GenEval 2's


class Judge(Protocol):
    """A model that is asked; `ask` gives a number in [0, 1] each, NaN, or None: no answer came."""

    def ask(self, questions: Sequence[Question]) -> list[float | None]: ...

    def close(self) -> None: ...


class Endpoint:
    """A model behind an OpenAI-style endpoint that gives `logprobs`, as vLLM and sglang do."""

    def __init__(self, settings: Settings):
        from flow_grpo.rewards.judges.chat import Chat  # httpx is an extra

        where = settings["vlm_url"], settings["vlm_model"]
        limits = settings["judge_concurrency"], settings["judge_timeout_s"]
        self.chat = Chat(*where, *limits, wants=WANTS, read=first_token)

    def ask(self, questions: Sequence[Question]) -> list[float | None]:
        answers = self.chat.ask([(each.images, each.text) for each in questions])
        pairs = zip(answers, questions, strict=True)
        return [a if a is None else share(a, each.answer, each.others) for a, each in pairs]

    def close(self) -> None:
        self.chat.close()


class ProbabilityReward(Reward):
    """Score by probabilities of answers: of the model in `rewards.vlm`, or at `rewards.vlm_url`.

    A score is NaN where one of its questions has none. `<name>_unanswered` counts a row's questions
    that got no answer, `<name>_unparsed` those whose answer was refused or of other words.
    """

    name: str

    @classmethod
    def check(cls, settings, prompts, metadata) -> None:
        if settings["vlm"]:
            check_model(settings, "vlm")
        else:
            check_endpoint(settings, "vlm")

    def __init__(self, settings, device):
        self.judge: Judge
        if settings["vlm"]:
            from flow_grpo.rewards.judges import local

            where = settings["vlm"], settings["vlm_revision"]
            self.judge = local.load(*where, device, settings["vlm_batch_size"])
        else:
            self.judge = Endpoint(settings)

    def questions(self, image: np.ndarray, batch: Batch, row: int) -> list[Question]:
        """Return what is asked about a row, at least one question."""
        raise NotImplementedError

    def columns(self, found: list[np.ndarray], batch: Batch) -> dict[str, list[float]]:
        """Turn each row's probabilities into columns, (B,) each, of which one has the name."""
        raise NotImplementedError

    def __call__(self, batch: Batch) -> dict:
        images = only_images(batch.images, self.name)
        asked = [self.questions(image, batch, row) for row, image in enumerate(images)]
        answers = iter(self.judge.ask([each for row in asked for each in row]))
        rows = [[next(answers) for _ in row] for row in asked]
        found = [np.array([np.nan if a is None else a for a in row], np.float64) for row in rows]
        lost = np.array([row.count(None) for row in rows])
        missing = np.array([np.isnan(row).sum() for row in found])
        counted = {f"{self.name}_unanswered": lost, f"{self.name}_unparsed": missing - lost}
        return self.columns(found, batch) | counted

    def close(self) -> None:
        self.judge.close()


class VQAScore(ProbabilityReward):
    """Score P(yes) to "does this figure show the prompt?", among all tokens (arXiv:2404.01291)."""

    name = "vqascore"

    @classmethod
    def check(cls, settings, prompts, metadata) -> None:
        super().check(settings, prompts, metadata)
        template(settings, cls.name)

    def __init__(self, settings, device):
        self.question = template(settings, self.name)
        super().__init__(settings, device)

    def questions(self, image, batch, row) -> list[Question]:
        text = self.question.replace("{prompt}", batch.prompts[row])
        return [Question((image,), text, "yes")]

    def columns(self, found, batch) -> dict:
        return {self.name: [row[0] for row in found]}


class SoftTIFA(ProbabilityReward):
    """Score the geometric mean of the probabilities of a prompt's atoms (arXiv:2512.16853).

    A row has GenEval 2's "vqa_list", [[question, answer], ...]: an answer's probability is among
    all tokens. `soft_tifa_am` is the arithmetic mean, `soft_tifa_<skill>` that of the atoms of one
    of SKILLS, where the row has "skills".
    """

    name = "soft_tifa"

    @classmethod
    def check(cls, settings, prompts, metadata) -> None:
        super().check(settings, prompts, metadata)
        template(settings, cls.name)
        for prompt, row in zip(prompts, metadata, strict=True):
            atoms, skills = row.get("vqa_list"), row.get("skills", [])
            if not _are_atoms(atoms):
                raise ValueError(
                    f'the prompt {prompt!r:.60} has no "vqa_list" of [question, answer], but '
                    f"{atoms!r:.60}. The converters of dataset/geneval2 and dataset/dpg write it."
                )
            if skills and len(skills) != len(atoms):
                raise ValueError(
                    f'the prompt {prompt!r:.60} has {len(atoms)} questions in its "vqa_list" and '
                    f'{len(skills)} "skills": one each is needed.'
                )

    def __init__(self, settings, device):
        self.question = template(settings, self.name)
        super().__init__(settings, device)

    def questions(self, image, batch, row) -> list[Question]:
        asked = batch.metadata[row]["vqa_list"]
        return [
            Question((image,), self.question.replace("{prompt}", text), answer)
            for text, answer in asked
        ]

    def columns(self, found, batch) -> dict:
        pairs = zip(batch.metadata, found, strict=True)
        skills = [row.get("skills") or [""] * len(each) for row, each in pairs]
        columns = {self.name: list(map(geometric, found))}
        columns[f"{self.name}_am"] = [row.mean() for row in found]
        for skill in SKILLS:
            chosen = [row[np.array(s) == skill] for row, s in zip(found, skills, strict=True)]
            columns[f"{self.name}_{skill}"] = [r.mean() if len(r) else np.nan for r in chosen]
        return columns


class DPG(SoftTIFA):
    """Score the share of a prompt's questions that are answered yes, as DPG-Bench (2403.05135).

    A question counts as no where one that it depends on does: "parents" has the numbers of these,
    from 0, in a list for each. Yes is what is likelier than no. DPG-Bench's own judge is mPLUG.
    """

    name = "dpg"

    @classmethod
    def check(cls, settings, prompts, metadata) -> None:
        super().check(settings, prompts, metadata)
        for prompt, row in zip(prompts, metadata, strict=True):
            try:
                depends(np.ones(len(row["vqa_list"])), row.get("parents"))
            except (TypeError, IndexError, ValueError) as error:
                raise ValueError(
                    f'the prompt {prompt!r:.60} has the "parents" {row.get("parents")!r:.60}: a '
                    f"list of earlier or later questions' numbers is needed for each ({error})."
                ) from None

    def questions(self, image, batch, row) -> list[Question]:
        asked = super().questions(image, batch, row)
        return [each._replace(answer="yes", others=("no",)) for each in asked]

    def columns(self, found, batch) -> dict:
        parents = [row.get("parents") for row in batch.metadata]
        return {self.name: [depends(p, of).mean() for p, of in zip(found, parents, strict=True)]}


def geometric(probabilities: np.ndarray) -> float:
    """Return the geometric mean of (K,) probabilities; 0 where one is 0, NaN where one is NaN."""
    with np.errstate(divide="ignore"):
        return float(np.exp(np.log(probabilities).mean()))


def depends(probabilities: np.ndarray, parents: list[list[int]] | None) -> np.ndarray:
    """Return (K,) verdicts, 1 for yes: NaN, or more than 1/2 where no parent's answer is no.

    One that counts as no is a no to those behind it, as in DPG-Bench. Raises ValueError unless
    there are K lists.
    """
    parents = [[]] * len(probabilities) if parents is None else parents
    if len(parents) != len(probabilities):
        raise ValueError(f"{len(parents)} lists for {len(probabilities)} questions")
    if min((n for of in parents for n in of), default=0) < 0:
        raise ValueError("a number below 0")
    said = np.where(np.isnan(probabilities), np.nan, probabilities > 0.5)
    for number, of in enumerate(parents):
        said[number] = said[[number, *of]].min()
    return said


def _are_atoms(atoms: object) -> bool:
    return (
        isinstance(atoms, list)
        and bool(atoms)
        and all(isinstance(each, list) and [*map(type, each)] == [str, str] for each in atoms)
    )
