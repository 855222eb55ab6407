"""Faster passes give what slow ones give, and sampling still computes what training does."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_memory_keys import noise_of, size_of
from tiny import LENGTH, prompt_batch

from config.base import base
from flow_grpo.conditioning import collate
from flow_grpo.launch import build
from flow_grpo.launch.verify import randomise_lora
from flow_grpo.parallel import speed

PROMPTS = ["a red cube", "two cats that say a green apple"]


class Model:
    """A tiny model with a LoRA that does something, and where its velocity is asked for."""

    def __init__(self, name: str):
        self.model = tiny.patched(name)
        build.add_trained_weights(self.model, base())
        randomise_lora(self.model)
        size, rows = size_of(name), len(PROMPTS)
        references = [tiny.pictures(name)] * rows
        batch = prompt_batch(self.model, size, PROMPTS, references, self.model.unguided)
        latents = self.model.initial_latents(size, noise_of(self.model, size, rows))
        self.inputs = latents, torch.full((rows,), 0.7), collate(self.model, batch, LENGTH)

    def velocity(self, with_gradient: bool = False) -> torch.Tensor:
        with torch.set_grad_enabled(with_gradient), torch.autocast("cpu", torch.bfloat16):
            return self.model.velocity(self.model.transformer, *self.inputs)

    def gradient(self) -> torch.Tensor:
        self.model.transformer.zero_grad()
        self.velocity(with_gradient=True).square().mean().backward()
        trained = (p for p in self.model.transformer.parameters() if p.requires_grad)
        return torch.cat([p.grad.flatten() for p in trained])


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "flux", "zimage"])
def test_compiled_blocks_compute_the_same_in_sampling_and_in_training(name):
    model = Model(name)
    velocity, gradient = model.velocity(), model.gradient()
    assert speed.compile_blocks(model.model.transformer) > 1
    sampled, trained = model.velocity(), model.velocity(with_gradient=True)
    assert torch.equal(sampled, trained) and trained.requires_grad and not sampled.requires_grad
    assert apart(sampled, velocity) < 0.02  # bf16
    assert apart(model.gradient(), gradient) < 0.05


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_adapters_that_leave_casts_to_autocast_compute_the_same_bits(name):
    model = Model(name)
    velocity, gradient = model.velocity(), model.gradient()
    speed.leave_casts_to_autocast(model.model.transformer)
    assert torch.equal(model.velocity(), velocity) and torch.equal(model.gradient(), gradient)
