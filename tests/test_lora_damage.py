"""A LoRA's file that is damaged, or was made to harm: refused by its name, with nothing added."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path

import fuzzing
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from test_lora_layouts import ALPHA, FILE, RANK, adapted, delta, layers, model, named, settings

PEFT, BESIDE = "adapter_model.safetensors", "adapter_config.json"


def in_diffusers_layout() -> dict[str, torch.Tensor]:
    return named("sd3", lambda layer: f"transformer.{layer}")


def refused(folder: Path, message: str) -> None:
    ours = model("sd3")
    before = {name: value.clone() for name, value in ours.transformer.state_dict().items()}
    with fuzzing.guarded(), pytest.raises(ValueError, match=message) as error:
        ours.load_lora(str(folder))
    assert str(folder) in str(error.value)
    after = ours.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize(
    "change",
    [
        lambda value: value[1:],
        lambda value: value[:, 1:],
        lambda value: value[..., None, None],
        lambda value: value[None],
        lambda value: value[:0],
        lambda value: value.flatten(),
        lambda value: value.index_fill(0, torch.tensor([1]), math.nan),
        lambda value: value.index_fill(1, torch.tensor([0]), -math.inf),
        lambda value: value.double() * 1e300,
        lambda value: value.int(),
        lambda value: value > 0,
        lambda value: value.to(torch.complex64),
    ],
    ids=range(12),
)
def test_a_matrix_that_does_not_fit_or_holds_no_numbers_adds_nothing(part, change, tmp_path):
    held = in_diffusers_layout()
    name = next(key for key in sorted(held, reverse=True) if part in key)
    save_file(held | {name: change(held[name]).contiguous()}, tmp_path / FILE)
    refused(tmp_path, "does not fit|in finite floats")


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_floats_of_any_kind_are_read_as_they_are(kind, tmp_path):
    held = {name: value.to(kind) for name, value in in_diffusers_layout().items()}
    save_file(held, tmp_path / FILE)
    ours = model("sd3")
    ours.load_lora(str(tmp_path))
    for layer in layers("sd3"):
        a, b = (held[f"transformer.{layer}.lora_{k}.weight"].double() for k in "AB")
        found = delta(ours.transformer, layer).double()
        torch.testing.assert_close(found, b @ a, rtol=1e-5, atol=1e-5)


def header(change):
    """A whole file, but for its header; the length before it fits."""

    def write(folder: Path) -> None:
        data = save(in_diffusers_layout())
        length = struct.unpack("<Q", data[:8])[0]
        head = change(data[8 : 8 + length].decode()).encode()
        (folder / FILE).write_bytes(struct.pack("<Q", len(head)) + head + data[8 + length :])

    return write


LIES = [
    header(lambda head: head.replace("F32", "F64", 1)),
    header(lambda head: head.replace('"data_offsets":[0', '"data_offsets":[-8', 1)),
    header(lambda head: head.replace('"data_offsets":[0', '"data_offsets":[4', 1)),
    header(lambda head: head.replace('"shape":[', '"shape":[18446744073709551615,', 1)),
    header(lambda head: head.replace("{", '{"__metadata__":[],', 1)),
    header(lambda head: head.replace("{", '{"__metadata__":{"a":3},', 1)),
    header(lambda head: "[" * 10**5),
    header(lambda head: '{"a":' * 10**4),
    header(lambda head: "{}"),
    lambda folder: (folder / FILE).write_bytes(b"\xff" * 9),
    lambda folder: (folder / FILE).write_bytes(b""),
]


@pytest.mark.parametrize("write", LIES, ids=range(len(LIES)))
def test_a_header_that_lies_is_refused(write, tmp_path):
    write(tmp_path)
    refused(tmp_path, f"{FILE}.* damaged")


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_only_a_regular_file_is_a_lora(kind, tmp_path):
    if kind == "pipe":
        os.mkfifo(tmp_path / FILE)
    elif kind == "folder":
        (tmp_path / FILE).mkdir()
    else:
        (tmp_path / FILE).symlink_to(FILE)
    refused(tmp_path, "no .safetensors file")


def say(folder: Path, where: str, text: str | None = None, **changed) -> None:
    """Write a LoRA that says something else, in its metadata or beside PEFT's file."""
    stated = {key: value for key, value in (settings("sd3") | changed).items() if value != "gone"}
    if where == "beside":
        held = named("sd3", lambda layer: f"base_model.model.{layer}")
        save_file(held, folder / PEFT)
        (folder / BESIDE).write_text(json.dumps(stated) if text is None else text)
        return
    told = json.dumps({f"transformer.{k}": v for k, v in stated.items()}) if text is None else text
    save_file(in_diffusers_layout(), folder / FILE, {"lora_adapter_metadata": told})


BOMB = r"(.*_?)*(.*\.)*x"
ODD = [
    *({"lora_alpha": value} for value in (None, True, "4", math.nan, math.inf, [4], 10**30)),
    *({"alpha_pattern": value} for value in ([1], "a", {"a": None}, {"(": 1}, {BOMB: 1})),
    *(
        {"target_modules": value}
        for value in (BOMB, "(", 3, [None], {"a": 1}, "a?" * 30 + "a" * 30)
    ),
    *({"exclude_modules": value} for value in (BOMB, [[]])),
    {"use_rslora": "yes"},
    {"use_dora": True},
    {"peft_type": "LOHA"},
    {"layer_replication": [[0, 4], [2, 5]]},
    *({"init_lora_weights": value} for value in ("pissa", "pissa_niter_16", "OLoRA", "corda")),
]


@pytest.mark.parametrize("where", ["beside", "metadata"])
@pytest.mark.parametrize("changed", ODD, ids=range(len(ODD)))
def test_what_is_said_of_it_must_be_what_peft_says_of_a_plain_lora(changed, where, tmp_path):
    say(tmp_path, where, **changed)
    refused(tmp_path, "the settings of a LoRA, .* can't be used .*(" + "|".join(changed) + ")")


@pytest.mark.parametrize("where", ["beside", "metadata"])
@pytest.mark.parametrize("text", ["", "3", "[]", "[1]", "{", "[" * 10**5, '{"a":' * 10**4, "\x00"])
def test_what_is_said_of_it_must_be_an_object(text, where, tmp_path):
    say(tmp_path, where, text)
    refused(tmp_path, "the settings of a LoRA, .* can't be used")


@pytest.mark.parametrize("where", ["beside", "metadata"])
@pytest.mark.parametrize(
    "changed, strengths",
    [
        ({}, (ALPHA / RANK, ALPHA / RANK)),
        ({"lora_alpha": 3}, (3 / RANK, 3 / RANK)),
        ({"lora_alpha": -1.5}, (-1.5 / RANK, -1.5 / RANK)),
        ({"lora_alpha": 0}, (0, 0)),
        ({"lora_alpha": "gone"}, (8 / RANK, 8 / RANK)),  # PEFT's default
        ({"use_rslora": True}, (ALPHA / 2, ALPHA / 2)),
        ({"alpha_pattern": {"FIRST": 6, ".*": 1}}, (6 / RANK, 1 / RANK)),
        ({"alpha_pattern": {"^FIRST": 6, "FIRST": 1}}, (6 / RANK, ALPHA / RANK)),
        ({"target_modules": r".*\.(to_q|to_k|to_v|nothing_else)"}, None),
        ({"target_modules": "all-linear"}, (ALPHA / RANK, ALPHA / RANK)),
        ({"init_lora_weights": "gaussian", "r": 99}, (ALPHA / RANK, ALPHA / RANK)),
    ],
)
def test_what_is_said_of_it_counts(changed, strengths, where, tmp_path):
    first, second = sorted(layers("sd3"))
    if pattern := changed.get("alpha_pattern"):
        changed = {"alpha_pattern": {k.replace("FIRST", first): v for k, v in pattern.items()}}
    say(tmp_path, where, **changed)
    if strengths is None and where == "beside":
        return refused(tmp_path, "weights missing")
    ours = model("sd3")
    ours.load_lora(str(tmp_path))
    assert adapted(ours.transformer) == {first, second}
    for layer, strength in zip((first, second), strengths or (ALPHA / RANK,) * 2, strict=True):
        a, b = layers("sd3")[layer]
        torch.testing.assert_close(delta(ours.transformer, layer), strength * (b @ a))


def test_a_flipped_bit_of_a_weight_is_what_the_file_says(tmp_path):
    save_file(in_diffusers_layout(), tmp_path / FILE)
    data = bytearray((tmp_path / FILE).read_bytes())
    data[-2] ^= 1  # the last weight's mantissa
    (tmp_path / FILE).write_bytes(data)
    held, ours = load_file(tmp_path / FILE), model("sd3")
    ours.load_lora(str(tmp_path))
    changed = 0
    for layer, (a, b) in layers("sd3").items():
        said = [held[f"transformer.{layer}.lora_{k}.weight"] for k in "AB"]
        changed += not (torch.equal(said[0], a) and torch.equal(said[1], b))
        torch.testing.assert_close(delta(ours.transformer, layer), said[1] @ said[0])
    assert changed == 1
