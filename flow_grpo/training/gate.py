"""The gate: before a run's first update, training must score exactly what was sampled."""

from __future__ import annotations

import torch

from flow_grpo.randomness import Randomness
from flow_grpo.records import Rollout
from flow_grpo.training.run import Run


@torch.no_grad()
def gate(run: Run, rollout: Rollout) -> None:
    """Compare sampling with training before the first update; stop where they disagree.

    What was found stays in the run's gate.json: the largest |log-ratio| of each trained step.

    Raises RuntimeError naming the usual causes.
    """
    objective, largest = run.objective, {}
    micro = rollout.rows(slice(0, run.plan.micro_batch_size))
    predict = run.predictor(micro)
    objective.prepare(micro, predict)
    for point in objective.points(micro, Randomness(run.config.seed, (run.epoch, 0))):
        mismatch = objective.mismatch(predict(point), micro, point)
        if mismatch is not None:
            largest[point.column] = run.ranks.gather(mismatch.max()).max().item()
    if not all(value <= objective.tolerance for value in largest.values()):  # NaN is not
        raise RuntimeError(
            f"before the first update the largest |log-ratio| of each trained step is {largest}; "
            f"at most {objective.tolerance:.3g} (a tenth of train.clip_range) is needed: training "
            f"does not score what was sampled. Usual causes: low precision "
            f"(config.mixed_precision), another batch size or padding in training, another "
            f"attention kernel, dropout. config.train.old_log_prob=replay removes most of them."
        )
    run.tracker.write("gate.json", {"epoch": run.epoch, "log_ratio": largest})
