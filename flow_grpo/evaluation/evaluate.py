"""Score the evaluation prompts by ODE sampling, each from its own fixed noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import nn

from flow_grpo.cli import progress
from flow_grpo.conditioning import Conditioner
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.evaluation.kept import NUM_CALLS, Kept
from flow_grpo.evaluation.tables import summarise
from flow_grpo.parallel.engine import Ranks
from flow_grpo.parallel.faults.stop import Stop, Stopped
from flow_grpo.prompts import Prompt, deal, eval_batches
from flow_grpo.randomness import Randomness
from flow_grpo.records import Guidance, PromptBatch, Size
from flow_grpo.rewards.batch import Batch, scatter
from flow_grpo.rewards.combine import Scorer, Scoring
from flow_grpo.rollouts import Row, whole
from flow_grpo.sampling import Schedule, decode, denoise

NUM_SHOWN = 48  # images of a sheet
PATIENCE_S = 60.0  # for a reward's call, beyond config.reward_timeout


@dataclass
class Evaluator:
    """What drawing and scoring images takes, with or without a training around it."""

    config: ConfigDict
    ranks: Ranks
    pipeline: PatchedPipeline
    model: nn.Module  # the transformer as the engine wrapped it
    size: Size  # of prompts that have none
    schedule: Schedule
    guidance: Guidance  # of evaluations, as the schedule is
    conditioner: Conditioner
    scorer: Scorer
    stop: Stop

    def prompt_batch(
        self,
        prompts: list[Prompt],
        rows: list[Row],
        guidance: Guidance,
        also: Guidance | None = None,
    ) -> PromptBatch:
        """Encode a call's prompts, of one size. also: a guidance of later predictions."""
        distinct = list(dict.fromkeys(prompts))
        (size,) = {prompt.size or self.size for prompt in distinct}
        images = {prompt: prompt.load_images() for prompt in distinct}
        encoded = [(p.text, p.images, images[p]) for p in distinct]
        branches = self.conditioner.branches(encoded, guidance, also)
        self.conditioner.rest()
        return PromptBatch(
            branches=branches,
            guidance=guidance,
            index=torch.tensor([distinct.index(prompt) for prompt in prompts]),
            owners=[Row(*row) for row in rows],
            size=size,
            prompts=[prompt.text for prompt in prompts],
            metadata=[prompt.metadata for prompt in prompts],
            references=[images[prompt] for prompt in prompts] if any(images.values()) else None,
        )

    def scores(self, scoring: Scoring) -> dict[str, np.ndarray]:
        """Wait for scores, (N,) for each of this rank's rows, of equal keys on all ranks.

        Raises Stopped, on all ranks, where one failed.
        """
        failure, scores = "", {}
        patience_s = PATIENCE_S + self.config.reward_timeout
        try:
            scores = scoring.result(patience_s)
        except RuntimeError as error:
            failure = str(error)
        self.ranks.watch.meet(patience_s + self.config.collective_timeout)
        world = self.ranks.gather_objects((failure, list(scores)))
        if failures := [each for each, _ in world if each]:
            raise Stopped(failures[0])
        # A reward that failed on this rank alone may have left columns out.
        missing = np.full(len(scores["avg"]), np.nan)
        names = dict.fromkeys(name for _, names in world for name in names)
        return {name: scores.get(name, missing) for name in names}

    def check_masked(self, average: np.ndarray) -> None:
        """Stop where too few of an epoch's images have a score. average: (N,) of this rank."""
        counts = [float(np.isnan(average).sum()), float(len(average))]
        masked, total = self.ranks.total(torch.tensor(counts, device=self.ranks.device)).tolist()
        if masked > self.config.max_masked_fraction * total:
            raise Stopped(
                f"{masked:.0f} of {total:.0f} images could not be scored, more than "
                f"config.max_masked_fraction={self.config.max_masked_fraction} of them"
                + (f"; {self.scorer.last_masked}" if self.scorer.last_masked else "")
            )


def sizes(config: ConfigDict) -> list[Size]:
    """Return the sizes at which a config's evaluations draw; [] for training's. ValueError."""
    names = list(config.sample.eval_sizes)
    try:
        found = [Size.read(name, config.num_frames) for name in names]
        if len(set(found)) < len(found):
            raise ValueError("one of them is there twice")
    except ValueError as error:
        raise ValueError(f"config.sample.eval_sizes={tuple(names)}: {error}.") from None
    return found


def at_sizes(evaluator: Evaluator) -> list[Evaluator]:
    """Return an evaluator for each of sizes(), of one model and one set of rewards."""
    return [replace(evaluator, size=size) for size in sizes(evaluator.config)] or [evaluator]


def spread(num_prompts: int) -> list[int]:
    """Choose up to NUM_SHOWN rows to show, evenly over the file."""
    return np.linspace(0, num_prompts - 1, min(NUM_SHOWN, num_prompts)).astype(int).tolist()


def score_prompts(
    evaluator: Evaluator,
    prompts: list[Prompt],
    shown: Container[int],
    on_image: Callable[[int, np.ndarray], None] = lambda number, image: None,
    kept: Kept | None = None,
) -> tuple[dict[str, np.ndarray], dict[int, np.ndarray]]:
    """Draw and score an image for each prompt; every rank must call it.

    A prompt's noise depends on the seed and its place in the list, so every evaluation of a run,
    and any other with its seed, draws from the same noise. shown: rows whose images are returned.
    on_image: called with each row and image on the rank that drew it, now and then twice. kept: of
    the main rank, which has what need not be drawn again, and gets what was, part by part.
    Returns the scores (N,) by name, and the shown images by row, ascending.
    """
    ranks, steps = evaluator.ranks, evaluator.schedule.num_steps
    done, in_parts = ranks.broadcast_object((kept.rows, True) if kept else (set(), False))
    batches = eval_batches(prompts, evaluator.config.sample.test_batch_size)
    batches = [batch for batch in batches if not done >= set(batch)]
    at_once = NUM_CALLS * ranks.num_ranks if in_parts else max(1, len(batches))
    parts = [batches[start : start + at_once] for start in range(0, len(batches), at_once)]
    dealt = [deal(part, ranks.rank, ranks.num_ranks) for part in parts]
    bar = progress(sum(map(len, dealt)) * steps, "evaluate", shown=ranks.is_main)
    columns: dict[str, np.ndarray] = {}
    images: dict[int, np.ndarray] = {}
    for all_of, mine in zip(parts, dealt, strict=True):
        columns, images = _score(evaluator, prompts, mine, shown, on_image, bar.update)
        if in_parts:
            rows = sorted({row for batch in all_of for row in batch})
            ranks.on_main(partial(_keep, kept, rows, columns, images))
    bar.close()
    return kept.result(len(prompts)) if kept else (columns, images)


def _keep(kept: Kept, rows: list[int], columns: dict, images: dict) -> None:
    kept.add(rows, {name: each[rows] for name, each in columns.items()}, images)


def _score(
    evaluator: Evaluator,
    prompts: list[Prompt],
    batches: list[list[int]],
    shown: Container[int],
    on_image: Callable[[int, np.ndarray], None],
    on_step: Callable[[], None],
) -> tuple[dict[str, np.ndarray], dict[int, np.ndarray]]:
    """Draw and score this rank's batches; return what all ranks have of theirs."""
    ranks, schedule = evaluator.ranks, evaluator.schedule
    pipeline, model = evaluator.pipeline, evaluator.model
    randomness, images = Randomness(evaluator.config.seed, ()), {}
    scoring = evaluator.scorer.start(held_out=True)
    for numbers in batches:
        batch = evaluator.prompt_batch(
            [prompts[n] for n in numbers],
            [(n, -1) for n in numbers],  # member -1: no training row draws this noise
            evaluator.guidance,
        )
        segment = whole(np.empty((len(numbers), 0), dtype=np.int64), schedule.num_steps)
        part = denoise(pipeline, model, batch, schedule, randomness, segment, on_step=on_step)
        drawn = decode(pipeline, part.rollout)
        scoring.add(Batch(drawn, batch.prompts, batch.metadata, batch.references))
        for number, image in zip(numbers, drawn, strict=True):
            on_image(number, image)
            if number in shown:
                images[number] = image
        evaluator.stop.check()
    world = ranks.gather_objects((sum(batches, []), evaluator.scores(scoring), images))
    columns = scatter(((rows, scores) for rows, scores, _ in world), len(prompts))
    images = {number: image for *_, part in world for number, image in part.items()}
    return columns, dict(sorted(images.items()))


def metrics(scores: dict[str, np.ndarray], prompts: list[Prompt]) -> dict[str, float]:
    """Average each score over all rows and over the rows of each tag, with 95 % intervals.

    Returns {"shapes": mean, "shapes_low": .., "shapes_high": .., "shapes/count": mean over the rows
    whose metadata has that "tag", "shapes_low/count": ..}. NaN scores are left out and counted
    under "shapes_missing". What has no value (no row, or a single prompt's interval) is absent.
    """
    found = {}
    tags = [prompt.tag for prompt in prompts]
    for row in summarise(scores, tags, [prompt.text for prompt in prompts]):
        suffix = f"/{row.tag}" if row.tag else ""
        if row.num_missing and not row.tag:
            found[f"{row.score}_missing"] = row.num_missing
        for end, value in {"": row.mean, "_low": row.low, "_high": row.high}.items():
            if not math.isnan(value):
                found[f"{row.score}{end}{suffix}"] = value
    return found
