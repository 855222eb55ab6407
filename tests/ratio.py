"""What tests of objectives on a ratio share: the worked step of fixtures.py as a rollout."""

import torch
from fixtures import F64, FIXTURE, NOISE_LEVEL, X, blank_batch

from config.base import base
from flow_grpo.objectives.base import Micro
from flow_grpo.objectives.registry import find
from flow_grpo.records import Rollout
from flow_grpo.sampling import Schedule

ADVANTAGES = torch.tensor([1.0, -1.0], dtype=F64)
SIGMAS = torch.tensor([1, 0.9, 0.8, 0.7, 0], dtype=F64)


def objective(kind="sde", sigmas=SIGMAS, name="grpo", **train):
    config = base(name)
    config.train.update(train)
    schedule = Schedule(sigmas, kind=kind, noise_level=NOISE_LEVEL[kind])
    return find(name)(config, schedule)


def fixture(kind="sde", advantages=ADVANTAGES):
    rows, truth = torch.arange(2), FIXTURE[kind]
    return Rollout(
        batch=blank_batch(rows, rows),
        steps=torch.full((2, 1), 2),
        next_steps=torch.full((2, 1), 3),
        latents=X[:, None].clone(),
        next_latents=torch.tensor(truth["next_latents"], dtype=F64)[:, None],
        log_probs=torch.tensor(truth["log_prob"], dtype=F64)[:, None],
        means=torch.tensor(truth["mean"], dtype=F64)[:, None],
        final=torch.zeros(2, 4, dtype=F64),
        leaf=torch.ones(2, dtype=torch.bool),
        parent=torch.full((2, 2), -1),
        advantages=advantages,
    )


def loss_and_gradient(grpo, micro, velocity, reference=None, old=None):
    """The loss of each row, and the gradient of their mean."""
    velocity = velocity.clone().requires_grad_()
    (point,) = grpo.points(micro, None)
    known = (old or {}) | {"reference": reference}
    loss = grpo.loss(velocity, known, micro, point)
    loss.value.mean().backward()
    return loss, velocity.grad


def prepared(grpo, rows, velocity_at):
    """What prepare() gives for each point of these rows, where this is the velocity."""
    points = grpo.points(rows, None)
    micro = Micro(rows, points, velocity_at, [None] * len(points))
    values = grpo.prepare([micro], lambda micros: [[m.velocity(p) for p in points] for m in micros])
    return [{name: of[0][k] for name, of in values.items()} for k in range(len(points))]
