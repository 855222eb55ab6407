"""Score the evaluation prompts by ODE sampling, each from its own fixed noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass

import ml_collections
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from flow_grpo.cli import progress
from flow_grpo.conditioning import Conditioner
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.evaluation.tables import summarise
from flow_grpo.parallel.stop import Stop, Stopped
from flow_grpo.prompts import Prompt, eval_batches
from flow_grpo.randomness import Randomness
from flow_grpo.records import Guidance, PromptBatch, Size
from flow_grpo.rewards.combine import Scorer
from flow_grpo.rollouts import Row, whole
from flow_grpo.sampling import Schedule, decode, denoise

NUM_SHOWN = 48  # pictures of a sheet
PATIENCE_S = 60.0  # for scores, beyond config.reward_timeout for each reward


@dataclass
class Evaluator:
    """What drawing and scoring pictures takes, with or without a training around it."""

    config: ml_collections.ConfigDict
    accelerator: Accelerator
    pipeline: PatchedPipeline
    model: nn.Module  # the transformer as accelerate wrapped it
    size: Size
    eval_schedule: Schedule
    eval_guidance: Guidance
    conditioner: Conditioner
    scorer: Scorer
    stop: Stop

    def prompt_batch(
        self, prompts: list[Prompt], rows: list[Row], guidance: Guidance
    ) -> PromptBatch:
        """Encode a call's prompts."""
        distinct = list(dict.fromkeys(prompts))
        images = {prompt: prompt.load_images() for prompt in distinct}
        encoded = [(p.text, p.images, images[p]) for p in distinct]
        branches = self.conditioner.branches(encoded, guidance)
        self.conditioner.rest()
        return PromptBatch(
            branches=branches,
            guidance=guidance,
            index=torch.tensor([distinct.index(prompt) for prompt in prompts]),
            owners=[Row(*row) for row in rows],
            size=self.size,
            prompts=[prompt.text for prompt in prompts],
            metadata=[prompt.metadata for prompt in prompts],
            references=[images[prompt] for prompt in prompts] if any(images.values()) else None,
        )

    def total(self, value: Tensor) -> Tensor:
        """Sum over ranks."""
        return self.accelerator.reduce(value, "sum")

    def scores(self, pending: list[Future]) -> list[dict[str, np.ndarray]]:
        """Wait for scores, a dict of (B,) for each future, of equal keys on all ranks.

        Raises Stopped, on all ranks, where one failed.
        """
        failure, scores = "", []
        patience_s = PATIENCE_S + self.config.reward_timeout * self.scorer.num_rewards
        for future in pending:
            try:
                scores.append(future.result(patience_s))
            except FutureTimeout:
                failure = f"the rewards gave no scores for {patience_s:g} s"
            except RuntimeError as error:
                failure = str(error)
            if failure:
                break
        names = list(dict.fromkeys(name for part in scores for name in part))
        world = gather_object([(failure, names)])
        if failures := [each for each, _ in world if each]:
            raise Stopped(failures[0])
        names = dict.fromkeys(name for _, each in world for name in each)
        return [_complete(part, names) for part in scores]

    def check_masked(self, average: np.ndarray) -> None:
        """Stop where too few of an epoch's pictures have a score. average: (N,) of this rank."""
        counts = [float(np.isnan(average).sum()), float(len(average))]
        masked, total = self.total(torch.tensor(counts, device=self.accelerator.device)).tolist()
        if masked > self.config.max_masked_fraction * total:
            raise Stopped(
                f"{masked:.0f} of {total:.0f} pictures could not be scored, more than "
                f"config.max_masked_fraction={self.config.max_masked_fraction} of them"
                + (f"; {self.scorer.last_masked}" if self.scorer.last_masked else "")
            )


def spread(num_prompts: int) -> list[int]:
    """Choose up to NUM_SHOWN rows to show, evenly over the file."""
    return np.linspace(0, num_prompts - 1, min(NUM_SHOWN, num_prompts)).astype(int).tolist()


def score_prompts(
    evaluator: Evaluator,
    prompts: list[Prompt],
    shown: Container[int],
    on_picture: Callable[[int, np.ndarray], None] = lambda number, image: None,
) -> tuple[dict[str, np.ndarray], dict[int, np.ndarray]]:
    """Draw and score a picture for each prompt; every rank must call it.

    A prompt's noise depends on the seed and its place in the list, so every evaluation of a run,
    and any other with its seed, draws from the same noise. shown: rows whose pictures are returned.
    on_picture: called with each row and picture on the rank that drew it, now and then twice.
    Returns the scores (N,) by name, and the shown pictures by row, ascending.
    """
    config, accelerator, schedule = evaluator.config, evaluator.accelerator, evaluator.eval_schedule
    rank, world_size = accelerator.process_index, accelerator.num_processes
    batches = eval_batches(prompts, config.sample.test_batch_size, rank, world_size)
    randomness, pending, pictures = Randomness(config.seed, ()), [], {}
    bar = progress(len(batches) * schedule.num_steps, "evaluate", shown=accelerator.is_main_process)
    for numbers in batches:
        batch = evaluator.prompt_batch(
            [prompts[n] for n in numbers],
            [(n, -1) for n in numbers],  # member -1: no training row draws this noise
            evaluator.eval_guidance,
        )
        segment = whole(np.empty((len(numbers), 0), dtype=np.int64), schedule.num_steps)
        part = denoise(
            evaluator.pipeline,
            evaluator.model,
            batch,
            schedule,
            randomness,
            segment,
            on_step=bar.update,
        )
        drawn = decode(evaluator.pipeline, part.rollout)
        pending.append(
            evaluator.scorer.submit(
                drawn, batch.prompts, batch.metadata, batch.references, held_out=True
            )
        )
        for number, image in zip(numbers, drawn, strict=True):
            on_picture(number, image)
            if number in shown:
                pictures[number] = image
        evaluator.stop.check()
    bar.close()
    table: dict[int, dict[str, float]] = {}
    for numbers, scores in zip(batches, evaluator.scores(pending), strict=True):
        for i, number in enumerate(numbers):
            table[number] = {name: float(values[i]) for name, values in scores.items()}
    rows = {k: v for part in gather_object([table]) for k, v in part.items()}
    images = {k: v for part in gather_object([pictures]) for k, v in part.items()}
    columns = {name: np.array([rows[n][name] for n in range(len(prompts))]) for name in rows[0]}
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
        values = {"": row.mean, "_low": row.low, "_high": row.high}
        found |= {
            f"{row.score}{end}{suffix}": value
            for end, value in values.items()
            if not math.isnan(value)
        }
    return found


def _complete(scores: dict[str, np.ndarray], names: Iterable[str]) -> dict[str, np.ndarray]:
    """Add the columns that a reward left out when it failed."""
    missing = np.full(len(scores["avg"]), np.nan)
    return {name: scores.get(name, missing) for name in names}
