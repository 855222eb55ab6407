"""Score the evaluation prompts by ODE sampling, each from its own fixed noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from typing import TYPE_CHECKING

import numpy as np
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from flow_grpo.sampling import Draw, sample
from flow_grpo.summary import summarise
from flow_grpo.training import alarm
from flow_grpo.training.prompts import Prompt, eval_batches
from flow_grpo.training.reporting.recorded import read_metrics
from flow_grpo.training.stop import Stopped
from flow_grpo.training.tracking import progress

if TYPE_CHECKING:
    from flow_grpo.training.run import Evaluator, Run

NUM_SHOWN, NUM_COLUMNS = 48, 12  # pictures of a sheet, and of its row


def evaluate(run: Run) -> dict[str, float]:
    """Evaluate the averaged weights if there are any, log a row and save a sheet of pictures.

    Returns what metrics() makes of the scores.
    """
    prompts = run.plan.eval_prompts
    with run.timer("eval"), run.snapshots.using("ema" if run.config.train.ema else "policy"):
        scores, images = score_prompts(run, prompts, spread(len(prompts)))
    found = metrics(scores, prompts)
    fallen = _fallen(run, scores)
    run.log("eval", found | ({"hacking_alarm": len(fallen)} if run.config.eval_reward_fn else {}))
    name = f"eval-{run.updater.num_updates:06d}"
    run.tracker.save_images(name, list(images.values()), NUM_COLUMNS)
    layout = {"num_columns": NUM_COLUMNS, "size": (run.size.height, run.size.width)}
    run.tracker.write("images/eval.json", layout | {"prompts": [prompts[n].text for n in images]})
    if fallen and run.config.hacking_alarm == "stop":
        raise Stopped(f"{_alarm(fallen)} (config.hacking_alarm=stop)")
    if fallen and run.config.hacking_alarm == "warn" and run.accelerator.is_main_process:
        tqdm.write(f"warning: {_alarm(fallen)}")
    return found


def _fallen(run: Run, scores: dict[str, np.ndarray]) -> list[str]:
    """Keep the scores of each prompt, and name the held-out rewards that fell, on all ranks."""
    fallen, prompts = [], run.plan.eval_prompts
    if run.accelerator.is_main_process:
        rows = read_metrics(run.folder, "eval") if run.tracker.num_bytes else []
        steps = [row["step"] for row in rows]
        held_out = list(run.config.eval_reward_fn)
        fallen = alarm.fallen(run.folder, steps, scores, held_out, prompts)
        alarm.write(run.folder, run.updater.num_updates, scores, prompts)
    return broadcast_object_list([fallen])[0]


def _alarm(fallen: list[str]) -> str:
    return (
        f"reward hacking: since the second evaluation before, the trained reward rose and held-out "
        f"rewards fell: {', '.join(fallen)} (95 % intervals of the change)"
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
    config, accelerator, sampler = evaluator.config, evaluator.accelerator, evaluator.eval_sampler
    rank, world_size = accelerator.process_index, accelerator.num_processes
    batches = eval_batches(prompts, config.sample.test_batch_size, rank, world_size)
    draw, pending, pictures = Draw(config.seed, ()), [], {}
    bar = progress(accelerator, len(batches) * sampler.num_steps, "evaluate")
    for numbers in batches:
        batch = evaluator.prompt_batch(
            [prompts[n] for n in numbers],
            [(n, -1) for n in numbers],  # member -1: no training row draws this noise
            sampler.guidance_scale,
        )
        part = sample(evaluator.pipeline, evaluator.model, batch, sampler, draw, on_step=bar.update)
        pending.append(
            evaluator.scorer.submit(
                part.images, batch.prompts, batch.metadata, batch.references, held_out=True
            )
        )
        for number, image in zip(numbers, part.images, strict=True):
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
