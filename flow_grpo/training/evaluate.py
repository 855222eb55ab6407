"""Score the evaluation prompts by ODE sampling, each from its own fixed noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from accelerate.utils import gather_object

from flow_grpo.sampling import Draw, sample
from flow_grpo.training.prompts import eval_batches
from flow_grpo.training.tracking import progress

if TYPE_CHECKING:
    from flow_grpo.training.run import Run

NUM_SHOWN = 48  # pictures of a sheet


def evaluate(run: Run) -> dict[str, float]:
    """Evaluate the averaged weights if there are any, log a row and save a sheet of pictures.

    A prompt's noise depends on the seed and its place in the file, so every evaluation of a run
    draws the same pictures from the same noise. Returns {"shapes": mean, "shapes/count": mean over
    the rows whose metadata has that "tag", ...}; NaN scores are left out and counted.
    """
    prompts = run.plan.eval_prompts
    shown = np.linspace(0, len(prompts) - 1, min(NUM_SHOWN, len(prompts))).astype(int).tolist()
    with run.timer("eval"), run.snapshots.using("ema" if run.config.train.ema else "policy"):
        scores, images = _score(run, shown)
    metrics = summarise(scores, [prompt.metadata for prompt in prompts])
    run.log("eval", metrics)
    run.tracker.save_images(f"eval-{run.updater.num_updates:06d}", images, num_columns=12)
    return metrics


def _score(run: Run, shown: list[int]) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Return the scores of all prompts, in the file's order, and the shown pictures."""
    prompts, accelerator = run.plan.eval_prompts, run.accelerator
    batches = eval_batches(
        prompts,
        run.config.sample.test_batch_size,
        accelerator.process_index,
        accelerator.num_processes,
    )
    draw, pending, pictures = Draw(run.config.seed, ()), [], {}
    bar = progress(accelerator, len(batches) * run.eval_sampler.num_steps, "evaluate")
    for numbers in batches:
        batch = run.prompt_batch(
            [prompts[n] for n in numbers],
            [(n, -1) for n in numbers],  # member -1: no training row draws this noise
            run.eval_sampler.guidance_scale,
        )
        part = sample(run.pipeline, run.model, batch, run.eval_sampler, draw, on_step=bar.update)
        pending.append(
            run.scorer.submit(part.images, batch.prompts, batch.metadata, batch.references)
        )
        pictures |= {n: im for n, im in zip(numbers, part.images, strict=True) if n in shown}
        run.stop.check()
    bar.close()
    table: dict[int, dict[str, float]] = {}
    for numbers, scores in zip(batches, run.scores(pending), strict=True):
        for i, number in enumerate(numbers):
            table[number] = {name: float(values[i]) for name, values in scores.items()}
    rows = {k: v for part in gather_object([table]) for k, v in part.items()}
    images = {k: v for part in gather_object([pictures]) for k, v in part.items()}
    columns = {name: np.array([rows[n][name] for n in range(len(prompts))]) for name in rows[0]}
    return columns, [images[number] for number in shown]


def summarise(scores: dict[str, np.ndarray], metadata: list[dict]) -> dict[str, float]:
    """Average each score over all rows and over the rows of each tag."""
    tags = np.array([row.get("tag", "") for row in metadata])
    metrics = {}
    for name, values in scores.items():
        present = ~np.isnan(values)
        if not present.all():
            metrics[f"{name}_missing"] = int((~present).sum())
        if present.any():
            metrics[name] = float(values[present].mean())
        for tag in sorted(set(tags) - {""}):
            if (rows := present & (tags == tag)).any():
                metrics[f"{name}/{tag}"] = float(values[rows].mean())
    return metrics
