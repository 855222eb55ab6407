"""What a run exports does the same in every reader, and trains on as it was."""

from __future__ import annotations

import json
import warnings

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_verify_model import task_of
from tiny import qwen

from flow_grpo.evaluation.comparison import call_stock, generate, initial_noise
from flow_grpo.launch.verify import difference, randomise_lora, velocity_of

ROWS = pytest.mark.parametrize("name", tiny.MODELS)
FILE = "pytorch_lora_weights.safetensors"


def exported(name, folder, rank=4, alpha=8, seed=0):
    """A model with a random LoRA, which is written to a folder."""
    model = tiny.patched(name)
    torch.manual_seed(seed)
    model.add_lora(rank, alpha, list(model.lora_target_modules))
    randomise_lora(model)
    for key, param in model.transformer.named_parameters():
        param.requires_grad_("lora_" in key and model.trains(key))
    trained = {n: p for n, p in model.transformer.named_parameters() if p.requires_grad}
    model.save_lora({n: p.detach() for n, p in trained.items()}, folder)
    with torch.no_grad():  # these do not train, so that no file has them
        for key, param in model.transformer.named_parameters():
            if "lora_B" in key and key not in trained:
                param.zero_()
    return model


@ROWS
def test_an_export_without_its_metadata_gives_the_trained_picture(name, tmp_path):
    model, task = exported(name, tmp_path), task_of(name, num_steps=2)
    ours = generate(model, task, 0)
    save_file(load_file(tmp_path / FILE), tmp_path / FILE)
    model.transformer.delete_adapters("default")
    assert difference(ours, generate(model, task, 0)) > 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of targets without weights
        model.pipe.load_lora_weights(tmp_path)
    with qwen.stock_reference_area(model.reference_area):  # elsewhere it is the same
        noise = initial_noise(model, task.size, [0])
        assert difference(ours, call_stock(model, task, noise, prompt=task.prompts[0])) == 0


@ROWS
def test_stock_and_peft_load_an_export_s_folder_as_it_is(name, tmp_path):
    model, task = exported(name, tmp_path), task_of(name)
    velocity, bare = velocity_of(model, task), tiny.patched(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bare.pipe.load_lora_weights(tmp_path)
        torch.testing.assert_close(velocity_of(bare, task), velocity, rtol=0, atol=0)
        bare = tiny.patched(name)
        PeftModel.from_pretrained(bare.transformer, tmp_path)
        torch.testing.assert_close(velocity_of(bare, task), velocity, rtol=0, atol=0)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["lora_alpha"] == written["r"] == 4
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert {f"base_model.model.{n}.lora_A.weight" for n in written["target_modules"]} < set(held)


@ROWS
def test_an_export_trains_on_as_it_was_whatever_its_alpha(name, tmp_path):
    model = exported(name, tmp_path)
    own = {n: p for n, p in model.transformer.named_parameters() if "lora_" in n}
    for file in ("", FILE, "adapter_model.safetensors"):
        bare = tiny.patched(name)
        bare.load_lora(str(tmp_path / file), rank=4, alpha=8)
        again = {n: p for n, p in bare.transformer.named_parameters() if "lora_" in n}
        assert set(again) <= set(own)
        for key, value in own.items():
            if key in again:
                torch.testing.assert_close(again[key], value, rtol=0, atol=0)
            else:
                assert not model.trains(key)


def test_an_alpha_that_is_no_power_of_two_of_the_rank_is_kept_to_the_last_bits(tmp_path):
    model, task = exported("sd3", tmp_path, rank=6, alpha=7), task_of("sd3")
    bare = tiny.patched("sd3")
    bare.load_lora(str(tmp_path))
    torch.testing.assert_close(
        velocity_of(bare, task), velocity_of(model, task), rtol=1e-4, atol=1e-5
    )
