"""The loop does not wait for the device: where tensors have no values, nothing can be read."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import toy
from fixtures import blank_batch
from test_sampling import DRAW, NUM_STEPS, STEPS, batch_of, schedule_of
from torch import nn

from flow_grpo.objectives.base import Micro
from flow_grpo.objectives.registry import OBJECTIVES
from flow_grpo.parallel.plain import Plain
from flow_grpo.rollouts import whole
from flow_grpo.sampling import KEPT, denoise

META = torch.device("meta")
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
