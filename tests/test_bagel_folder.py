"""BAGEL's folder at its true size and a tiny one, what is written for others, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import bagel_released
import numpy as np
import pytest
import running
import tiny
import torch
from diffusers import AutoencoderKL
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from test_lora_exports import exported
from tiny.parts import qwen_tokenizer

from flow_grpo.diffusers_patch import stock
from flow_grpo.diffusers_patch.bagel import folder as disk
from flow_grpo.diffusers_patch.bagel.bagel import Bagel
from flow_grpo.diffusers_patch.bagel.pipeline import BagelPipeline
from flow_grpo.launch import model_files, settings, space, weights
from flow_grpo.parallel import speed
from flow_grpo.records import Guidance
from scripts import export_bagel


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.save("bagel", tmp_path_factory.mktemp("bagel"))


def loaded(folder: Path, dtype=torch.float32, **more) -> Bagel:
    return Bagel.from_pretrained(str(folder), dtype=dtype, device="cpu", **more)


def test_the_released_file_is_read_key_for_key_at_its_true_size(tmp_path):
    known = bagel_released.shapes()
    assert sum(map(np.prod, known.values())) == 14_607_260_128  # 27.21 GiB in bf16, as published
    place = bagel_released.write(tmp_path)
    model = disk.read_transformer(
        place, qwen_tokenizer(), torch.bfloat16, torch.float32, device="meta"
    )
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert found == {name: known[name] for name in found}
    assert sum(p.numel() for p in model.parameters()) == 13_625_163_840
    left = {name for name in known if name not in found}
    text_only = {"language_model.lm_head.weight", "language_model.model.norm.weight"}
    assert text_only < left
    assert all(n.startswith(("vit_", "connector.")) for n in left - text_only)
    trained = [param for name, param in model.named_parameters() if "_moe_gen" in name]
    assert len(trained) == 393 and sum(p.numel() for p in trained) == 6_525_628_928
    kinds = {name: param.dtype for name, param in model.named_parameters()}
    assert all(d == (torch.float32, torch.bfloat16)["_moe_gen" not in n] for n, d in kinds.items())
    assert len(speed.repeated_blocks(model)) == 28


@pytest.mark.parametrize(("use_lora", "mib"), [(True, "2,464"), (False, "130,402")])
def test_a_checkpoint_s_room_is_known_before_weights_load(use_lora, mib, tmp_path, monkeypatch):
    """16 bytes for each of 161,480,704 weights, or 6,525,628,928: fp32, moments, an export.

    And 4 for each of the released file's 8.1 billion others, of which the export has most.
    """
    argv = running.arguments(
        tmp_path, pretrained__model=bagel_released.write(tmp_path), use_lora=use_lora
    )
    config, _ = settings.load([*argv, "--config.train.lora_rank=64"], running.DEFAULT)
    usage = space.shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ValueError, match=f"a checkpoint takes about {mib} MiB"):
        space.check(config, Bagel.lora_target_modules, tmp_path, None, Bagel.trained_part)


def test_a_folder_that_is_written_has_the_released_files_and_names(folder):
    names = {file.name for file in folder.iterdir()}
    assert {"ema.safetensors", "ae.safetensors", "llm_config.json", "tokenizer.json"} <= names
    held = load_file(folder / "ema.safetensors")
    assert set(held) < set(bagel_released.shapes())
    vae = load_file(folder / "ae.safetensors")
    assert vae["encoder.mid.attn_1.q.weight"].shape == (8, 8, 1, 1)
    assert {"decoder.up.3.block.1.norm1.weight", "decoder.up.1.upsample.conv.bias"} < set(vae)
    assert {"encoder.down.0.downsample.conv.weight", "decoder.norm_out.bias"} < set(vae)


def test_a_folder_gives_back_what_was_written_into_it(folder):
    truth, pipe = tiny.patched("bagel").pipe, loaded(folder).pipe
    for part in ("transformer", "vae"):
        ours, theirs = (getattr(each, part).state_dict() for each in (pipe, truth))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    marks = ("start_of_image", "end_of_image", "max_latent_size", "patch_dim", "rope_theta")
    assert all(pipe.transformer.config[m] == truth.transformer.config[m] for m in marks)
    factors = ("scaling_factor", "shift_factor")
    assert [pipe.vae.config[f] for f in factors] == [0.3611, 0.1159]


def test_the_vae_s_names_are_those_of_diffusers_own_converter(folder):
    single_file_utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    held, vae = load_file(folder / "ae.safetensors"), loaded(folder).pipe.vae
    truth = single_file_utils.convert_ldm_vae_checkpoint(held, dict(vae.config))
    found = vae.state_dict()
    assert truth.keys() == found.keys()
    assert all(torch.equal(truth[name].reshape(v.shape), v) for name, v in found.items())


def test_the_vae_has_the_released_number_of_weights_at_its_true_size():
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(disk.vae_config((128, 256, 512, 512), 2, 16))
    state = vae.state_dict()
    assert len({disk.released_vae_name(name) for name in state}) == 244
    assert sum(value.numel() for value in state.values()) == 83_819_683


def test_only_the_expert_that_trains_is_in_fp32_for_a_full_fine_tune(folder):
    model = loaded(folder, torch.bfloat16, transformer_dtype=torch.float32)
    for name, param in model.transformer.named_parameters():
        assert param.dtype == (torch.float32 if model.trains(name) else torch.bfloat16), name
    assert model.transformer.dtype == torch.bfloat16  # what it is fed with
    assert model.encode("a cat", (), 8).tensors["embeds"].dtype == torch.bfloat16


def test_a_lora_merges_into_the_authors_own_module(tmp_path):
    """Whose names are the file's; here bare layers of them, with what we leave out."""
    model = exported("bagel", tmp_path, rank=4, alpha=8)
    whole = torch.nn.Module()
    bases = {n: p for n, p in tiny.patched("bagel").transformer.state_dict().items()}
    for name, value in bases.items():
        if value.ndim == 2 and "_proj" in name:
            *path, last = name.removesuffix(".weight").split(".")
            parent = whole
            for part in path:
                parent.add_module(part, getattr(parent, part, torch.nn.Module()))
                parent = getattr(parent, part)
            layer = torch.nn.Linear(value.shape[1], value.shape[0], bias=False)
            layer.weight.data = value.clone()
            parent.add_module(last, layer)
    whole.language_model.lm_head = torch.nn.Linear(32, 5)
    merged = PeftModel.from_pretrained(whole, tmp_path).merge_and_unload().state_dict()
    moved = 0
    for name, param in model.transformer.named_parameters():
        if "lora_A" in name:
            layer = name.removesuffix(".lora_A.default.weight")
            b = model.transformer.get_parameter(name.replace("lora_A", "lora_B"))
            truth = bases[f"{layer}.weight"] + 8 / 4 * b @ param
            torch.testing.assert_close(merged[f"{layer}.weight"], truth, rtol=0, atol=1e-6)
            moved += 1
    assert moved == 14
    still = {n for n in merged if "_moe_gen" not in n and n in bases}
    assert still and all(torch.equal(merged[n], bases[n]) for n in still)


def test_a_full_fine_tune_goes_into_a_copy_of_the_released_file(folder, tmp_path):
    released = {n: v.bfloat16() for n, v in load_file(folder / "ema.safetensors").items()}
    released["vit_model.x"] = torch.ones(3, dtype=torch.bfloat16)  # what we do not read
    shutil.copytree(folder, tmp_path / "released")
    save_file(released, tmp_path / "released" / "ema.safetensors")
    model = loaded(tmp_path / "released")
    with torch.no_grad():
        for name, param in model.transformer.named_parameters():
            param += 0.25 * model.trains(name)
    model.save_transformer(model.transformer.state_dict(), tmp_path / "transformer")
    paths = {"model": "released", "transformer": "transformer", "out": "ema.safetensors"}
    export_bagel.main(["x", *(f"--{key}={tmp_path / name}" for key, name in paths.items())])
    written = load_file(tmp_path / "ema.safetensors")
    assert written.keys() == released.keys()
    for name, value in released.items():
        trained = "_moe_gen" in name
        truth = model.transformer.state_dict()[name].bfloat16() if trained else value
        assert torch.equal(written[name], truth) and trained == (not torch.equal(truth, value))


def test_the_stock_loader_takes_a_fine_tuned_transformer(folder, tmp_path):
    model = loaded(folder)
    with torch.no_grad():
        model.transformer.vae2llm.bias += 1
    model.save_transformer(model.transformer.state_dict(), tmp_path / "transformer")
    pipe = stock.load(str(folder), torch.float32, str(tmp_path / "transformer"))
    assert isinstance(pipe, BagelPipeline)
    assert torch.equal(pipe.transformer.vae2llm.bias, model.transformer.vae2llm.bias)
    again = loaded(folder)
    again.load_transformer(tmp_path / "transformer")
    assert torch.equal(again.transformer.vae2llm.bias, model.transformer.vae2llm.bias)


def config_of(folder: Path, tmp_path: Path, **keys) -> list[str]:
    (tmp_path / "prompts").mkdir()
    for split in ("train", "test"):
        (tmp_path / "prompts" / f"{split}.txt").write_text("\n".join(running.PROMPTS))
    keys = {"use_lora": True, "train__cfg": True, "mixed_precision": "no"} | keys
    return running.arguments(tmp_path, **({"pretrained__model": folder} | keys))


def stray_lora(tmp_path: Path) -> Path:
    layer = "language_model.model.layers.0.self_attn.q_proj"
    held = {
        f"transformer.{layer}.lora_{k}.weight": torch.ones(*s)
        for k, s in (("A", (4, 32)), ("B", (32, 4)))
    }
    save_file(held, tmp_path / "stray.safetensors")
    return tmp_path / "stray.safetensors"


REFUSED = {
    "a target of the other expert": (
        {"train__lora_targets": ("self_attn.q_proj_moe_gen", "down_proj")},
        r"config.train.lora_targets=.*'down_proj' would train what reads the prompts of Bagel",
    ),
    "a LoRA of the other expert": (
        {"train__lora_path": stray_lora, "train__lora_rank": 4},
        r"config.train.lora_path=.*layers.0.self_attn.q_proj' would train what reads the prompts",
    ),
    "fp16": ({"mixed_precision": "fp16"}, "config.mixed_precision=fp16"),
    "a side past the table": ({"resolution": 144}, "config.resolution=144.*nearest is 128"),
    "no multiple": ({"height": 40}, "config.height=40.*multiples of 16.*nearest is 32"),
    "offload": ({"encoders": "offload"}, "config.encoders='offload': Bagel has no text encoder"),
    "precompute": ({"encoders": "precompute"}, "config.encoders='precompute': Bagel has no text"),
    "compile": ({"compile": True}, "config.compile=True: Bagel's prompts are not padded"),
    "attention": ({"attention_backend": "native"}, "attention_backend='native': Bagel has no"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_can_not_do_is_refused_before_weights_load(case, folder, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(BagelPipeline, "from_pretrained", never)
    keys, message = REFUSED[case]
    keys = {key: v(tmp_path) if callable(v) else v for key, v in keys.items()}
    with pytest.raises(ValueError, match=message):
        running.prepare(config_of(folder, tmp_path, **keys), Bagel)


def test_reference_pictures_are_refused_with_a_word_on_editing(folder, tmp_path):
    argv = config_of(folder, tmp_path)
    for split in ("train", "test"):
        (tmp_path / "prompts" / f"{split}.txt").unlink()
        row = {"prompt": "a cat", "image": "a.png"}
        (tmp_path / "prompts" / f"{split}_metadata.jsonl").write_text(json.dumps(row))
    Image.fromarray(tiny.picture(32, 32)).save(tmp_path / "prompts" / "a.png")
    with pytest.raises(ValueError, match="'a cat' has 1 reference images: Bagel draws from text"):
        running.prepare(argv, Bagel)


def test_the_interval_of_a_config_reaches_the_model(folder, tmp_path):
    keys = {"sample__guidance_interval": (0.4, 0.9), "sample__eval_guidance_scale": 3.0}
    argv = config_of(folder, tmp_path, sample__guidance_scale=4.0, **keys)
    run = running.prepare(argv, Bagel)
    assert run.guidance == Guidance(4.0, (0.4, 0.9))
    assert run.evaluator.guidance == Guidance(3.0, (0.4, 0.9))


@pytest.mark.parametrize("interval", [(0.9, 0.4), (0.5,), (0.1, 0.2, 0.3)])
def test_an_interval_that_is_none_is_refused(interval, folder, tmp_path):
    argv = config_of(folder, tmp_path, sample__guidance_interval=interval)
    with pytest.raises(ValueError, match="config.sample.guidance_interval.* two rising numbers"):
        running.prepare(argv, Bagel)


@pytest.mark.parametrize("name", ["ema.safetensors", "ae.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_file_that_is_missing_or_cut_is_named(name, damage, folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    if damage == "missing":
        (broken / name).unlink()
    else:
        (broken / name).write_bytes((folder / name).read_bytes()[:-8])
    config = settings.load(config_of(broken, tmp_path), running.DEFAULT)[0]
    with pytest.raises(ValueError, match=f"config.pretrained.model=.*{name}"):
        model_files.check(config)


def test_files_that_do_not_belong_together_are_named(folder, tmp_path):
    mixed = shutil.copytree(folder, tmp_path / "mixed")
    stated = json.loads((mixed / "llm_config.json").read_text())
    (mixed / "llm_config.json").write_text(json.dumps(stated | {"intermediate_size": 64}))
    with pytest.raises(ValueError, match=r"ema.safetensors has as .*mlp.*the shape \[64, 32\]"):
        loaded(mixed)
    (mixed / "llm_config.json").write_text("{}")
    with pytest.raises(ValueError, match="llm_config.json has no vocab_size"):
        loaded(mixed)


def test_a_vae_of_others_is_named(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    save_file({"decoder.x": torch.ones(1)}, other / "ae.safetensors")
    with pytest.raises(ValueError, match="ae.safetensors is no VAE .*FLUX.1.*conv1"):
        loaded(other)
    held = load_file(folder / "ae.safetensors") | {"quant_conv.weight": torch.ones(1)}
    save_file(held, other / "ae.safetensors")
    with pytest.raises(ValueError, match="ae.safetensors has quant_conv.weight, which"):
        loaded(other)


def test_a_fine_tune_of_another_base_is_not_exported(folder, tmp_path):
    model = loaded(folder)
    state = model.transformer.state_dict()
    model.save_transformer(state, tmp_path / "transformer")
    del state["language_model.model.norm_moe_gen.weight"]
    save_file(state, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="is not trained from .*norm_moe_gen.weight differs"):
        disk.export(folder, tmp_path / "transformer", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_released_folder_is_no_checkpoint(folder):
    with pytest.raises(ValueError, match="is a whole pipeline"):
        weights.find(str(folder))
