"""Rollouts with the LoRA added to the weights: the same pictures but for rounding, no bit lost."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import running
import tiny
import torch
from forking import FSDP, on_ranks
from peft.tuners.lora import LoraLayer
from test_speed import apart
from test_waits import Launches

from config import grpo
from config.base import base, with_objective
from flow_grpo import plan
from flow_grpo.conditioning import guidances
from flow_grpo.launch import build
from flow_grpo.launch.estimate.model import MODE, Fake, describe
from flow_grpo.launch.verify import randomise_lora
from flow_grpo.parallel import speed
from flow_grpo.training import collect, loop
from flow_grpo.training.snapshots import no_adapter

MERGED = {"objective": "nft", "sample__merged_lora": True}


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def count_calls(transformer: torch.nn.Module) -> list[str]:
    """Return what will get an entry for each pass through an adapter's matrix."""
    calls = []
    for name, layer in transformer.named_modules():
        if ".lora_A." in name:
            layer.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


@pytest.fixture
def transformer() -> torch.nn.Module:
    model = tiny.patched("sd3")
    build.add_trained_weights(model, base())
    randomise_lora(model)
    return model.transformer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_hold_the_adapter_and_are_put_back_to_the_bit(transformer, dtype):
    for name, param in transformer.named_parameters():
        param.data = param.data.to(torch.float32 if "lora_" in name else dtype)
    before = state(transformer)
    layers = [layer for layer in transformer.modules() if isinstance(layer, LoraLayer)]
    whole = [
        (layer.get_base_layer().weight.float() + layer.get_delta_weight("default")).to(dtype)
        for layer in layers
    ]
    with pytest.raises(RuntimeError, match="out of luck"), speed.merged(transformer):
        for layer, expected in zip(layers, whole, strict=True):
            assert torch.equal(layer.get_base_layer().weight, expected)
        assert not same(state(transformer), before)
        raise RuntimeError("out of luck")
    assert same(state(transformer), before) and not any(layer.merged for layer in layers)


def test_what_is_switched_off_is_not_added(transformer):
    before = state(transformer)
    with no_adapter(transformer), speed.merged(transformer):
        assert same(state(transformer), before)


@pytest.mark.parametrize("objective", ["epg", "nft"])  # of which the latter rolls out by a copy
def test_a_rollout_is_that_of_the_adapter_which_it_does_not_call(files, tmp_path, objective):
    keys = MERGED | running.lora(files) | {"objective": objective, "logdir": tmp_path}
    run = running.prepare(running.arguments(files, **keys))
    copied = collect.roll_out(run, 0).rollout.final
    for _, param in running.trained_parameters(run):
        param.data.mul_(1.5)
    calls = count_calls(run.pipeline.transformer)
    before = state(run.pipeline.transformer)
    merged = collect.roll_out(run, 0).rollout.final
    assert not calls and same(state(run.pipeline.transformer), before)
    run.config.sample.merged_lora = False
    own = collect.roll_out(run, 0).rollout.final
    assert calls and 0 < apart(merged, own) < 1e-5
    assert torch.equal(merged, copied) == (objective == "nft")
    run.close()


def test_a_run_trains_by_them_and_changes_its_adapter_alone(files, tmp_path):
    keys = MERGED | running.lora(files) | {"logdir": tmp_path}
    run = running.prepare(running.arguments(files, **keys))
    before = state(run.pipeline.transformer)
    loop.train(run)
    run.close()
    after = state(run.pipeline.transformer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("lora_" in name for name in changed)


@pytest.mark.parametrize("name", ["pickscore_sd3", "pickscore_flux"])
def test_it_spares_two_fifths_of_a_released_model_s_launches(name):
    config = with_objective(getattr(grpo, name)(), "nft")
    config.dataset, config.mixed_precision = "dataset/ocr", "bf16"
    fake = Fake(config, describe(config)[0], plan.make(config, 8), casts_trained=False)
    transformer, found = fake.pipeline.transformer, []
    for way in (nullcontext(), speed.merged(transformer)):
        counted = Launches(transformer, torch.device("cpu"))
        with torch.no_grad(), MODE, way, torch.autocast("cpu", torch.bfloat16), counted:
            fake._velocity(2, guidances(config).training, fake.size)
        found.append(counted.of_model)
    assert 0.55 < found[1] / found[0] < 0.62, found


@pytest.mark.parametrize(
    ("keys", "remedy"),
    [
        ({"use_lora": False}, "train a LoRA"),
        ({"use_lora": True, "objective": "grpo"}, "such as nft"),
        ({"use_lora": True, "objective": "sft", "sample__source": "data"}, "nothing is rolled out"),
    ],
)
def test_what_has_no_adapter_or_needs_log_probs_is_refused(files, keys, remedy):
    with pytest.raises(ValueError, match=f"config.sample.merged_lora=True with .*{remedy}"):
        running.prepare(running.arguments(files, **MERGED | keys))


def prepare(files) -> None:
    with pytest.raises(ValueError, match="cut the weights in parts.*zero2.yaml"):
        running.prepare(running.arguments(files, **MERGED, **running.lora(files)))


@pytest.mark.slow
def test_an_engine_that_cuts_weights_refuses_it(files):
    on_ranks(2, FSDP, prepare, files)
