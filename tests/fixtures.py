"""What several tests share: one worked step, grids of sigmas, rows without a prompt.

The step goes from sigma 0.8 to 0.7 on two rows of four elements; its numbers are closed forms.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from flow_grpo import sde
from flow_grpo.records import Cond, Guidance, PromptBatch, Size
from flow_grpo.rollouts import Row, whole
from flow_grpo.sampling import decode, denoise

F64 = torch.float64
NOISE_LEVEL = {"sde": 0.7, "dance": 0.3, "cps": 0.8}
STOCHASTIC = pytest.mark.parametrize("kind", list(NOISE_LEVEL))
GUARD = 0.9
X = torch.tensor([[0.5, -1, 0.25, 2], [1, 0, -0.5, 0.75]], dtype=F64)
V = torch.tensor([[0.1, -0.2, 0.3, -0.4], [0.5, -0.6, 0.7, -0.8]], dtype=F64)
Z = torch.tensor([[1, -1, 0.5, -0.5], [0.25, -0.75, 1.5, -2]], dtype=F64)
V_NEW = V + 0.01 * torch.tensor([[1, 2, -1, 0.5], [-2, 1, 0.5, 1]], dtype=F64)
FIXTURE = {  # by kind, with V and Z; log_ratio and kl of V_NEW; slope is d mean / d velocity
    "sde": dict(
        std=0.4427188724,
        mean=[[0.4263, -0.8526, 0.182025, 1.8048], [0.81525, 0.0747, -0.5259, 0.757725]],
        next_latents=[
            [0.8690188724, -1.2953188724, 0.4033844362, 1.5834405638],
            [0.9259297181, -0.2573391543, 0.1381783086, -0.1277127448],
        ],
        log_prob=[-0.4166182233, -0.9634932233],
        log_ratio=[0.0012241453, 0.0017514269],
        kl=6.1783522003e-06,
        slope=-0.1245,
        excess=0.03950625,
    ),
    "dance": dict(
        std=0.0948683298,
        mean=[
            [0.487075, -0.97415, 0.21825625, 2.0292],
            [0.9438125, 0.060675, -0.567975, 0.82668125],
        ],
        next_latents=[
            [0.5819433298, -1.0690183298, 0.2656904149, 1.9817658351],
            [0.9675295825, -0.0104762474, -0.4256725053, 0.6369445904],
        ],
        log_prob=[1.1238268176, 0.5769518176],
        log_ratio=[0.0045747664, 0.0065734247],
        kl=8.8769666884e-05,
        slope=-0.101125,
        excess=0.00115664,
    ),
    "cps": dict(
        std=0.6657395614,
        mean=[
            [0.2384821860, -0.4769643719, 0.0700566878, 1.1113188404],
            [0.4179430857, 0.1180425725, -0.3958722826, 0.5446240187],
        ],
        next_latents=[
            [0.9042217474, -1.1427039333, 0.4029264685, 0.7784490597],
            [0.5843779760, -0.3812620986, 0.6027370595, -0.7868551041],
        ],
        log_prob=[-0.2770057273, -0.7617657500],
        log_ratio=[0.0011399924, 0.0016311525],
        kl=6.8226977044e-06,
        slope=-0.1967376208,
        excess=0,
    ),
}
# Ten steps, as SD3's scheduler shifts them.
SD3_SIGMAS = [1, 0.9601293103, 0.9133489461, 0.8576923077, 0.7903682720, 0.7072784810, 0.6021505376]
SD3_SIGMAS += [0.4648760331, 0.2780487805, 0.0089285714, 0]


def step(kind, velocity=V, latents=X, sigma=0.8, sigma_next=0.7, level=None, **given):
    """Make the worked step, or one that differs from it in what is given."""
    level = NOISE_LEVEL.get(kind, 0.0) if level is None else level
    given.setdefault("sigma_guard", GUARD)
    if not {"noise", "next_latents"} & set(given):
        given["noise"] = Z
    return sde.step(kind, velocity, latents, sigma, sigma_next, level, **given)


def close(actual, expected, atol=1e-9, rtol=0.0):
    """Compare in the dtype and shape of what was computed."""
    expected = torch.as_tensor(expected, dtype=actual.dtype).broadcast_to(actual.shape)
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shifted(u, shift=3):
    """Move noise levels towards 1 (arXiv:2403.03206)."""
    return shift * u / (1 + (shift - 1) * u)


def clean_grid(num_steps):
    return shifted(1 - torch.arange(num_steps + 1, dtype=F64) / num_steps).tolist()


def blank_batch(group: Tensor, member: Tensor) -> PromptBatch:
    """Rows of these groups and members, without a prompt or a size; group, member: (B,) int64."""
    return PromptBatch(
        branches={"positive": [Cond({})]},
        guidance=Guidance(1.0),
        index=torch.zeros_like(group),
        owners=[Row(*owner) for owner in zip(group.tolist(), member.tolist(), strict=True)],
        size=Size(1, 1),
        prompts=[""] * len(group),
        metadata=[{}] * len(group),
    )


def sample(pipeline, model, batch, schedule, randomness, steps=None, keep_steps=True):
    """Draw each row from noise to its image; `images` beside what denoise() returns.

    steps: (B, K), the stochastic ones.
    """
    steps = np.empty((len(batch), 0), dtype=np.int64) if steps is None else steps
    keep = ("states", "log_probs") if keep_steps else ()
    segment = whole(steps, schedule.num_steps)
    part = denoise(pipeline, model, batch, schedule, randomness, segment, keep=keep)
    part.rollout.images = decode(pipeline, part.rollout)
    return part.rollout
