"""The loop does not wait for the device: where tensors have no values, nothing can be read.

Nor does it launch much beside the model's own kernels.
"""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import toy
from fixtures import blank_batch
from test_sampling import DRAW, NUM_STEPS, OWNERS, SIZE, STEPS, batch_of, schedule_of
from tiny import LENGTH
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flow_grpo.objectives.base import Micro
from flow_grpo.objectives.registry import OBJECTIVES
from flow_grpo.parallel.plain import Plain
from flow_grpo.rollouts import whole
from flow_grpo.sampling import KEPT, Schedule, denoise

META = torch.device("meta")
MOST_LAUNCHES = 90  # a step; SD3.5-M itself makes thousands
GROUPED = ("crd", "dgpo")  # whose sums over a group are read, too


@pytest.mark.parametrize(
    "name", ["sd3", "flux_kontext", "flux2_klein", "qwenimage_edit", "wan", "zimage", "bagel"]
)
def test_denoising_reads_nothing_from_the_device(name):
    model = tiny.patched(name)
    batch, schedule = batch_of(model, name, 4.5), schedule_of(model, "sde")
    model.transformer.to(META)
    model.move_vae(META)  # which says where the model is
    steps = np.repeat(STEPS["windows"], 2, axis=0)
    for solver in ("euler", "dpm2"):
        there = replace(schedule, sigmas=schedule.sigmas.to(META), solver=solver)
        segment = whole(steps, NUM_STEPS)
        done = denoise(model, model.transformer, batch, there, DRAW, segment, keep=KEPT)
        assert done.rollout.final.device == done.rollout.log_probs.device == META


class Launches(TorchDispatchMode):
    """Counts the operations that are no views, each a kernel of a device: ours and the model's."""

    def __init__(self, model: nn.Module, device: torch.device = META):
        super().__init__()
        self.own, self.of_model, self.inside, self.device = 0, 0, False, device
        model.register_forward_pre_hook(lambda *_: setattr(self, "inside", True))
        model.register_forward_hook(lambda *_: setattr(self, "inside", False))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        outputs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if any(x.device == self.device for x in outputs) and not is_view:
            self.own += not self.inside
            self.of_model += self.inside
        return out


def own_launches(name: str, num_steps: int, owners: list[tuple[int, int]]) -> int:
    model = tiny.patched(name)
    batch = batch_of(model, name, 4.5, owners)
    model.transformer.to(META)
    model.move_vae(META)
    schedule = Schedule(model.sigmas(num_steps, SIZE).to(META), "sde", 0.7, False, LENGTH)
    steps = np.tile(np.arange(num_steps - 1), (len(owners), 1))
    with Launches(model.transformer) as counted:
        denoise(model, model.transformer, batch, schedule, DRAW, whole(steps, num_steps), keep=KEPT)
    return counted.own


@pytest.mark.parametrize("name", ["sd3", "flux_kontext", "qwenimage_edit", "zimage"])
def test_a_stochastic_step_launches_few_kernels_of_its_own_however_many_rows(name):
    few, many = [(0, 0), (0, 1)], OWNERS
    assert own_launches(name, 6, few) == own_launches(name, 6, many)
    of_six = own_launches(name, 12, few) - own_launches(name, 6, few)
    assert 0 < of_six <= 6 * MOST_LAUNCHES, of_six / 6


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(4))

    def forward(self, latents, sigma):
        return latents * self.factor


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_update_reads_once(name, tmp_path, monkeypatch):
    monkeypatch.setattr(toy.Toy, "device", META)
    monkeypatch.setattr(toy, "Drift", lambda sigmas: Scale().to(META))
    engine = Plain("no", cpu=True)
    engine.ranks.device = META
    engine._accelerator.prepare_model = lambda module: module  # as it would be sent to a CPU
    run = toy.make_run(
        tmp_path,
        toy.plan_of(2, 4),
        torch.optim.SGD,
        sigmas=toy.GRID.to(META),
        objective=name,
        engine=engine,
        sample__noise_level=0.7,
    )
    batch = blank_batch(torch.arange(8) // 4, torch.arange(8) % 4)
    segment = whole(run.trained_steps(batch.group.tolist(), 0), run.schedule.num_steps)
    rows = denoise(run.pipeline, run.model, batch, run.schedule, DRAW, segment, keep=KEPT).rollout
    rows.advantages = rows.weights = torch.ones(len(rows), device=META)
    micros = []
    for part in (rows.rows(slice(4)), rows.rows(slice(4, 8))):
        points = run.objective.points(part, DRAW)
        micros.append(Micro(part, points, run.predictor(part), [None] * len(points)))
    reads = []

    def read(tensor):
        reads.append(tensor.shape)
        return torch.zeros(tensor.shape).numpy().tolist()

    monkeypatch.setattr(torch.Tensor, "tolist", read)
    run.objective.after_update(run.snapshots, 1, {})
    toy.loop.take_step(run, micros, 8.0 * len(micros[0].points))
    assert len(reads) == (2 if name in GROUPED else 1)
