"""A model's folder is read whatever its files are called, and what it lacks is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import running
import tiny
import torch

from flow_grpo.diffusers_patch.disk import files as disk
from flow_grpo.launch import model_files, settings, weights

# Bagel's folder has no parts; test_bagel.py reads it.
ROWS = pytest.mark.parametrize("name", [n for n in tiny.MODELS if n != "bagel"])
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def config_of(folder, **more):
    argv = running.arguments(folder, pretrained__model=folder, **more)
    return settings.load(argv, running.DEFAULT)[0]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "sd3"
    tiny.sd3.sd3().save_pretrained(folder, max_shard_size="30KB", variant="fp16")
    return folder


@ROWS
def test_a_folder_of_a_variant_loads_as_a_plain_one(name, tmp_path):
    tiny.MODELS[name][1]().save_pretrained(tmp_path, variant="fp16", max_shard_size="50KB")
    assert list((tmp_path / "transformer").glob("*.fp16-00001-of-*.safetensors"))
    model_files.check(config_of(tmp_path))
    family = tiny.MODELS[name][0].variants()[0].variant(str(tmp_path), "main")
    model = family.from_pretrained(str(tmp_path), dtype=torch.float32, device="cpu")
    found, truth = model.transformer.state_dict(), tiny.patched(name).transformer.state_dict()
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[key], truth[key]) for key in truth)
    model.load_transformer(tmp_path / "transformer")


def test_of_a_part_that_has_both_the_plain_files_are_taken(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "both")
    tiny.sd3.sd3().vae.save_pretrained(folder / "vae")
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
    assert disk.weights(folder / "vae")[0] == ""
    weights.check_part(folder / "vae")
    assert disk.variant(str(folder), "main", ("vae", "transformer", "tokenizer")) == "fp16"
    assert disk.variant(str(folder), "main", ("vae", "tokenizer")) is None


def first(folder, pattern):
    return min(Path(folder).glob(pattern))


def cut(file):
    file.write_bytes(file.read_bytes()[:-8])


DAMAGE = {
    "no shard": ("transformer/*-00002-of-*.safetensors", Path.unlink, "is missing"),
    "no index": ("transformer/*.index.fp16.json", Path.unlink, "lacks the index"),
    "no encoder": ("text_encoder_2", shutil.rmtree, "text_encoder_2 is missing"),
    "no tokenizer": ("tokenizer_3", shutil.rmtree, "tokenizer_3 is missing"),
    "no config": ("vae/config.json", Path.unlink, "config.json is missing"),
    "cut short": ("vae/*.safetensors", cut, "is cut short or damaged"),
    "empty": ("text_encoder/*.safetensors", lambda file: file.write_bytes(b""), "is cut short"),
    "no header": (
        "vae/*.safetensors",
        lambda file: file.write_bytes(b"<html>" * 9),
        "is cut short",
    ),
    "a pointer": ("transformer/*.safetensors", lambda f: f.write_text(POINTER), "git-lfs pointer"),
    "its tokenizer's": ("tokenizer/*.json", lambda f: f.write_text(POINTER), "git-lfs pointer"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_a_folder_lacks_is_named_before_weights_load(sharded, tmp_path, case):
    pattern, damage, message = DAMAGE[case]
    folder = shutil.copytree(sharded, tmp_path / "damaged")
    file = first(folder, pattern)
    damage(file)
    with pytest.raises(
        ValueError, match=f"config.pretrained.model='{folder}': .*{message}"
    ) as said:
        model_files.check(config_of(folder))
    assert str(file if "index" not in case else file.parent) in str(said.value)


def test_weights_that_are_gone_are_named(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "damaged")
    for file in (folder / "text_encoder_3").glob("model*"):
        file.unlink()
    with pytest.raises(ValueError, match="text_encoder_3 has no .safetensors file"):
        model_files.check(config_of(folder))


def test_encoders_may_be_gone_once_all_is_encoded(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "bare")
    for part in folder.glob("text_encoder*"):
        shutil.rmtree(part)
    model_files.check(config_of(folder, encoders="precompute"))


def test_a_fine_tuned_transformer_that_is_cut_short_is_refused(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "damaged")
    cut(first(folder, "transformer/*.safetensors"))
    found = weights.find(str(folder / "transformer"))
    with pytest.raises(ValueError, match="is cut short"):
        weights.check_class(found, {"transformer": ["diffusers", "SD3Transformer2DModel"]})
