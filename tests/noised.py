"""Two final latents of four elements noised to sigma 0.6, and velocities there."""

import torch
from fixtures import F64, blank_batch

from flow_grpo.records import Point, Rollout

FINAL = torch.tensor([[0.3, -0.7, 1.1, 0.2], [-0.4, 0.9, 0, -1.2]], dtype=F64)
NOISE = torch.tensor([[0.5, 1.5, -1, 0.25]] * 2, dtype=F64)
SIGMA = 0.6
NOISED = torch.tensor([[0.42, 0.62, -0.16, 0.23], [0.14, 1.26, -0.6, -0.33]], dtype=F64)
TARGET = NOISE - FINAL
V_REF = TARGET + torch.tensor([[0.1, -0.2, 0.05, 0.3], [-0.1, 0.2, 0.15, -0.25]], dtype=F64)
V_OLD = V_REF + torch.tensor([[0.02, -0.01, 0.03, 0], [0.01, 0.02, -0.02, 0.01]], dtype=F64)
V = V_OLD + torch.tensor([[-0.05, 0.04, 0.02, -0.06], [0.03, -0.02, 0.05, 0.04]], dtype=F64)


def rollout(final=FINAL, advantages=(1.5, -0.5), group=None, member=None):
    rows = torch.arange(len(final))
    none = final.new_zeros(len(final), 0)
    return Rollout(
        batch=blank_batch(
            group=rows if group is None else torch.tensor(group),
            member=rows if member is None else torch.tensor(member),
        ),
        steps=none.long(),
        next_steps=none.long(),
        latents=none,
        next_latents=none,
        log_probs=none,
        final=final,
        leaf=torch.ones(len(final), dtype=torch.bool),
        parent=torch.full((len(final), 2), -1),
        advantages=torch.tensor(advantages, dtype=F64),
    )


def noised(step=3):
    rows = len(NOISED)
    sigma = torch.full((rows,), SIGMA, dtype=F64)
    return Point(NOISED, sigma, step=torch.full((rows,), step), noise=NOISE)
