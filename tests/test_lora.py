"""A run starts from a LoRA that PEFT saved, as older Flow-GRPO code wrote its checkpoints."""

from __future__ import annotations

import json

import pytest
import running
import tiny
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from flow_grpo.diffusers_patch.sd3 import SD3


def save_peft(pipeline, folder, rank=4):
    """Save an adapter whose B is not zero as PeftModel.save_pretrained does; returns the model."""
    transformer = StableDiffusion3Pipeline.from_pretrained(pipeline).transformer.eval()
    torch.manual_seed(2)
    targets = list(SD3.lora_target_modules)
    model = get_peft_model(
        transformer, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    )
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.normal_(std=0.2)
    model.save_pretrained(folder)
    return model


def start(files, path, **changed):
    settings = {"use_lora": True, "train__lora_path": path, "train__lora_rank": 4}
    settings |= {"train__lora_alpha": 8, "tracker": "none"} | changed
    return running.prepare(running.arguments(files, **settings))


def inputs():
    torch.manual_seed(0)
    return {
        "hidden_states": torch.randn(2, tiny.parts.LATENT_CHANNELS, 4, 4),
        "timestep": torch.tensor([900.0, 300.0]),
        "encoder_hidden_states": torch.randn(2, 5, tiny.parts.JOINT_DIM),
        "pooled_projections": torch.randn(2, 2 * tiny.parts.POOLED_DIM),
        "return_dict": False,
    }


@pytest.fixture(scope="module")
def adapter(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "lora"
    return folder, save_peft(files / "sd3", folder)


@torch.no_grad()
def test_a_peft_adapter_gives_the_velocity_that_it_gave_when_it_was_saved(files, adapter, tmp_path):
    folder, saved = adapter
    assert {path.name for path in folder.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    run = start(files, folder, logdir=tmp_path)
    trained = dict(running.trained_parameters(run))
    assert trained and all("lora_" in name for name in trained)
    found = run.pipeline.transformer(**inputs())[0]
    torch.testing.assert_close(found, saved(**inputs())[0], rtol=0, atol=0)
    run.pipeline.transformer.disable_adapters()
    assert not torch.allclose(found, run.pipeline.transformer(**inputs())[0], atol=1e-3)


def test_it_trains_on_and_its_export_loads_as_a_diffusers_lora(files, adapter, tmp_path):
    folder, saved = adapter
    settings = {"train__lora_path": folder, "train__lora_rank": 4, "train__lora_alpha": 8}
    run = running.train(
        running.arguments(files, logdir=tmp_path, use_lora=True, num_epochs=1, **settings)
    )
    again = start(
        files, run.folder / "checkpoints" / "checkpoint-2" / "lora", logdir=tmp_path / "b"
    )
    with torch.no_grad():
        ours, theirs = (r.pipeline.transformer(**inputs())[0] for r in (run, again))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert not torch.equal(ours, saved(**inputs())[0])


def test_an_adapter_of_another_rank_is_refused(files, adapter, tmp_path):
    with pytest.raises(ValueError, match="config.train.lora_rank=8, but that of the LoRA .* is 4"):
        start(files, adapter[0], logdir=tmp_path, train__lora_rank=8)


def test_an_adapter_that_lacks_weights_is_refused(files, adapter, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    weights = load_file(adapter[0] / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, broken / "adapter_model.safetensors")
    config = json.loads((adapter[0] / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="1 weights missing, 0 unknown, such as .*lora_A"):
        start(files, broken, logdir=tmp_path)
