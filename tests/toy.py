"""A Gaussian model with a closed-form velocity, in a run of the library's own loop.

Clean latents are N(0, 0.25) per element, so the velocity of the exact model is known at every
noise level; the trained weights are one number per step that is added to it.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import blank_batch, clean_grid, sample
from torch import nn

from config.base import base
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.evaluation.evaluate import Evaluator
from flow_grpo.objectives.base import Micro
from flow_grpo.objectives.registry import find
from flow_grpo.parallel.plain import Plain
from flow_grpo.plan import Plan
from flow_grpo.randomness import Randomness
from flow_grpo.records import Arranged, Size
from flow_grpo.sampling import Schedule
from flow_grpo.training import arrange, collect, loop
from flow_grpo.training.optimizer import Updater
from flow_grpo.training.run import Run
from flow_grpo.training.snapshots import Snapshots
from flow_grpo.training.tracking import Tracker

VARIANCE = 0.25  # of the clean latents
GRID = torch.tensor(clean_grid(10), dtype=torch.float32)


class Drift(nn.Module):
    """The exact velocity plus a trained number for each step."""

    def __init__(self, sigmas):
        super().__init__()
        self.sigmas = sigmas
        self.shift = nn.Parameter(torch.zeros(len(sigmas) - 1, dtype=sigmas.dtype))

    def forward(self, latents, sigma):
        step = (sigma[:, None] == self.sigmas[:-1]).nonzero()[:, 1]
        assert len(step) == len(sigma), "a sigma that is not of the grid"
        sigma = sigma[:, None]
        spread = (1 - sigma) ** 2 * VARIANCE + sigma**2
        return (sigma - (1 - sigma) * VARIANCE) / spread * latents + self.shift[step][:, None]


class NeverStop:
    """A run that nobody asks to end, whose process keeps its signals' handlers."""

    asked = False

    def check(self):
        pass

    poll = check

    def pace(self, seconds):
        pass


class Toy(PatchedPipeline):
    device = torch.device("cpu")

    def __init__(self, sigmas):
        self.transformer = Drift(sigmas)

    def noise_shape(self, size):
        return (4,)

    def collate(self, conds, pad_to):
        return {}

    def velocity(self, model, latents, sigma, conditioning):
        return model(latents, sigma)

    def decode(self, latents, size):
        return latents.new_zeros(len(latents), 3, 1, 1)


def make_run(
    folder,
    plan,
    optimizer_class,
    sigmas=GRID,
    objective_class=None,
    engine=None,
    objective="grpo",
    **keys,
):
    config = base(objective)
    config.tracker = "none"
    config.update_from_flattened_dict({key.replace("__", "."): keys[key] for key in keys})
    train = config.train
    engine = engine or Plain("no", cpu=True)
    pipeline = Toy(sigmas)
    schedule = Schedule(
        sigmas,
        kind=config.sample.sde_type,
        noise_level=config.sample.noise_level,
        same_latent=config.sample.same_latent,
    )
    objective = (objective_class or find(objective))(config, schedule)
    engine.wrap(
        pipeline.transformer,
        optimizer_class(pipeline.transformer.parameters()),
        train.max_grad_norm,
    )
    names = (*objective.snapshots, *(["ema"] if train.ema else []))
    run = Run(
        config=config,
        plan=plan,
        identity={},
        folder=folder,
        evaluator=Evaluator(
            config=config,
            ranks=engine.ranks,
            pipeline=pipeline,
            model=engine.model,
            size=Size(1, 1),
            schedule=schedule,
            guidance=pipeline.unguided,
            conditioner=None,
            scorer=None,
            stop=NeverStop(),
        ),
        schedule=schedule,
        guidance=pipeline.unguided,
        objective=objective,
        engine=engine,
        updater=Updater(engine, train, 1000),
        snapshots=Snapshots(engine, names, use_lora=False),
        tracker=Tracker(engine.ranks, Path(folder)),
    )
    run.tracker.start(config)
    return run


def plan_of(num_groups, group_size, num_micro_batches=1, num_updates=1, world_size=1):
    return Plan(
        world_size=world_size,
        num_groups=num_groups,
        group_size=group_size,
        num_micro_batches=num_micro_batches,
        micro_batch_size=num_groups * group_size // world_size // num_micro_batches,
        num_updates=num_updates,
        num_inner_epochs=1,
        seed=42,
        train_prompts=[],
        eval_prompts=[],
    )


def roll_out(run):
    rows = torch.arange(run.plan.num_groups * run.plan.group_size)
    batch = blank_batch(rows // run.plan.group_size, rows % run.plan.group_size)
    steps = run.trained_steps(batch.group.tolist(), run.epoch)
    randomness = Randomness(run.config.seed, (run.epoch,))
    return sample(run.pipeline, run.model, batch, run.schedule, randomness, steps=steps)


def reward(rollout):
    """Score (N,) fp64: highest where the image is 1 all over."""
    return -((rollout.final.double() - 1) ** 2).mean(1)


def weigh(run, rollout, scores=None):
    """Let the run arrange these rows by their scores, (N,) fp64; they get their advantages.

    Returns what collect.weigh() gets and gives: the rows, what is arranged, the metrics.
    """
    scores = reward(rollout) if scores is None else scores
    parts = collect.Drawn.in_turn([rollout])
    sampled = collect.Sampled(parts, rollout.images, None, [])
    return sampled, *collect.weigh(run, sampled, {"avg": scores.numpy()}, run.epoch)


def train_epoch(run):
    """Sample, score and update once; returns the metrics of the rollout."""
    rollout = roll_out(run)
    sampled, arranged, metrics = weigh(run, rollout)
    assert metrics["reward/avg"] == pytest.approx(reward(rollout).mean().item())
    loop.update(run, sampled, arranged, run.epoch)
    return metrics


def micro_batch(run, rows):
    """Return what the loop makes of a micro-batch's rows."""
    points = run.objective.points(rows, Randomness(0, (0, 0)))
    kept = rows.weights > 0
    trained = None if kept.all() else kept.nonzero().flatten()
    return Micro(rows, points, run.predictor(rows), [trained] * len(points))


def an_update(run, parts):
    """Return what loop.take_step() wants of these rows: micro-batches, and the world's weight."""
    micros = [micro_batch(run, rows) for rows in parts]
    weights = run.ranks.gather(torch.cat([rows.weights.double() for rows in parts]))
    world, all_rows = Arranged([], weights, weights), [[np.arange(len(weights))]]
    return micros, arrange.total_weight(world, all_rows, len(micros[0].points))


def take_step(run, parts):
    """Let the run make one optimizer step on micro-batches of these rows."""
    loop.take_step(run, *an_update(run, parts))
