"""The gate: before a run's first update, training must score exactly what was sampled."""

import numpy as np
import torch
from torch import Tensor

from flow_grpo import sde
from flow_grpo.randomness import Randomness
from flow_grpo.records import Rollout
from flow_grpo.sampling import Schedule, replay
from flow_grpo.training.run import Run

STEP_LIMIT = 1e-5  # of a log-prob that is computed again from the same velocity

PRECISION = (
    "Usual causes: low precision (config.mixed_precision), another batch size, guidance or padding "
    "in training, another attention kernel, dropout. config.train.old_log_prob=replay allows for "
    "precision and batch size."
)
CAUSES = {
    "step": "The kernel, its noise level or the sigmas differ between sampling and training.",
    "log_ratio": PRECISION,
    "nats": PRECISION,
    "velocity": "Usual causes: another guidance, padding or sigma in training, dropout, a "
    "precision that is too low (config.mixed_precision). config.train.gate_tolerance is the limit.",
}


@torch.no_grad()
def gate(run: Run, parts: list[Rollout], epoch: int) -> None:
    """Compare sampling with training before the first update; raise RuntimeError if they disagree.

    parts: rows of each size as sampled, with their velocities; none where no steps are kept. They
    are predicted again as training does it. The largest figures of each trained step stay in the
    run's gate.json:

    step: |log-prob of the sampled velocity, scored again, less the rollout's|: the kernel.
    log_ratio: |log-prob of training's velocity less the rollout's|: what the loss sees.
    nats: the same of the whole image, not of a mean over its elements.
    velocity: rms of the two velocities' difference over the rms of the sampled one.
    """
    if not parts or not parts[0].steps.shape[1]:
        return
    found: dict[str, dict[int, list[float]]] = {name: {} for name in CAUSES}
    for number in range(max(run.ranks.gather_objects(len(parts)))):  # equal calls on all ranks
        rows = parts[min(number, len(parts) - 1)].rows(slice(0, run.plan.micro_batch_size))
        velocity = run.predictor(rows)
        for point in run.objective.points(rows, Randomness(run.config.seed, (epoch, 0))):
            measured = measure(run.objective.schedule, rows, point.column, velocity(point))
            for name, value in measured.items():
                worst = run.ranks.gather(value.max()).max().item()
                found[name].setdefault(point.column, []).append(worst)
    figures = {
        name: {column: float(np.max(worst)) for column, worst in columns.items()}
        for name, columns in found.items()
    }
    for name, limit in ({"step": STEP_LIMIT} | run.objective.gate_limits()).items():
        if not all(value <= limit for value in figures[name].values()):  # NaN is not
            raise RuntimeError(
                f"before the first update the largest {name} of each trained step is "
                f"{figures[name]}; at most {limit:.3g} is needed: training does not score what was "
                f"sampled. {CAUSES[name]} All figures: {figures}."
            )
    run.tracker.write("gate.json", {"epoch": epoch} | figures)


def measure(schedule: Schedule, rows: Rollout, column: int, velocity: Tensor) -> dict[str, Tensor]:
    """Compare one step of M rows with another prediction at its state, (M,) each; see gate()."""
    sampled, old = rows.velocities[:, column], rows.log_probs[:, column]
    apart = (velocity - sampled).flatten(1).norm(dim=1) / sampled.flatten(1).norm(dim=1)
    again = replay(schedule, rows, column, velocity)
    log_ratio = (again.log_prob - old).abs()
    return {
        "step": (replay(schedule, rows, column, sampled).log_prob - old).abs(),
        "log_ratio": log_ratio,
        "nats": log_ratio / sde.of_a_nat(schedule.kind, again),
        "velocity": apart,
    }
