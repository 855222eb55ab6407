"""A run's own evaluations: a row of metrics, a sheet of images, the alarm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from flow_grpo.evaluation import alarm, looks
from flow_grpo.evaluation.evaluate import at_sizes, metrics, score_prompts, spread
from flow_grpo.parallel.faults.stop import Stopped
from flow_grpo.report.recorded import read_metrics
from flow_grpo.report.sheets import cell

if TYPE_CHECKING:
    from flow_grpo.training.run import Run

NUM_COLUMNS = 12  # images of a sheet's row


def evaluate(run: Run) -> dict[str, float]:
    """Evaluate the average if there is one, log a row, save a sheet; return metrics()."""
    prompts = run.plan.eval_prompts
    seen: dict[int, tuple[float, float]] = {}

    def look(number: int, image: np.ndarray) -> None:
        seen[number] = looks.looks(image)

    with run.timer("eval"), run.snapshots.using("ema" if run.config.train.ema else "policy"):
        shown, (evaluator, *others) = spread(len(prompts)), at_sizes(run.evaluator)
        scores, images = score_prompts(evaluator, prompts, shown, look)
        further = {str(each.size): score_prompts(each, prompts, shown) for each in others}
    for size, (more, drawn) in further.items():
        scores |= {f"{name}@{size}": values for name, values in more.items()}
        sheet = f"eval-{run.updater.num_updates:06d}@{size}"
        run.tracker.save_images(sheet, list(drawn.values()), NUM_COLUMNS)
    found = metrics(scores, prompts)
    world = {n: each for part in run.ranks.gather_objects(seen) for n, each in part.items()}
    run.log("look", looks.means(world[n] for n in sorted(world)))
    fallen = _fallen(run, scores)
    run.log("eval", found | ({"hacking_alarm": len(fallen)} if run.config.eval_reward_fn else {}))
    name = f"eval-{run.updater.num_updates:06d}"
    run.tracker.save_images(name, list(images.values()), NUM_COLUMNS)
    layout = {"num_columns": NUM_COLUMNS, "size": cell(list(images.values()))}
    run.tracker.write("images/eval.json", layout | {"prompts": [prompts[n].text for n in images]})
    alarmed = (
        f"reward hacking: since the second evaluation before, the trained reward rose and held-out "
        f"rewards fell: {', '.join(fallen)} (95 % intervals of the change)"
    )
    if fallen and run.config.hacking_alarm == "stop":
        raise Stopped(f"{alarmed} (config.hacking_alarm=stop)")
    if fallen and run.config.hacking_alarm == "warn" and run.ranks.is_main:
        tqdm.write(f"warning: {alarmed}")
    return found


def _fallen(run: Run, scores: dict[str, np.ndarray]) -> list[str]:
    """Keep the scores of each prompt, and name the held-out rewards that fell, on all ranks."""
    fallen, prompts = [], run.plan.eval_prompts
    if run.ranks.is_main:
        rows = read_metrics(run.folder, "eval") if run.tracker.num_bytes else []
        steps = [row["step"] for row in rows]
        held_out = list(run.config.eval_reward_fn)
        fallen = alarm.fallen(run.folder, steps, scores, held_out, prompts)
        alarm.write(run.folder, run.updater.num_updates, scores, prompts)
    return run.ranks.broadcast_object(fallen)
