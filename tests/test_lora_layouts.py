"""Every layout in which trainers write a LoRA does what it says in every model, or is refused."""

from __future__ import annotations

import copy
import json
from functools import cache

import pytest
import tiny
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

ROWS = pytest.mark.parametrize("name", tiny.MODELS)
RANK, ALPHA = 4, 2.0
FILE = "pytorch_lora_weights.safetensors"


@cache
def built(name):
    return tiny.patched(name)


def model(name):
    """A model whose transformer has no adapter yet."""
    fresh = copy.copy(built(name))
    fresh.transformer = copy.deepcopy(fresh.transformer)
    return fresh


@cache
def layers(name):
    """A and B of two of a model's layers, one of them narrower than it is wide, where there is."""
    family, transformer = built(name), built(name).transformer
    targets = tuple(f".{target}" for target in family.lora_target_modules)
    linear = {n: m for n, m in transformer.named_modules() if n.endswith(targets)}
    chosen = {n: linear[n] for n in (min(linear), max(linear))}
    torch.manual_seed(3)
    return {
        n: (torch.randn(RANK, m.in_features), torch.randn(m.out_features, RANK))
        for n, m in chosen.items()
    }


def named(name, form, kinds=("lora_A", "lora_B"), alpha=False):
    weights = {}
    for layer, pair in layers(name).items():
        weights |= {f"{form(layer)}.{k}.weight": v for k, v in zip(kinds, pair, strict=True)}
        weights |= {f"{form(layer)}.alpha": torch.tensor(ALPHA)} if alpha else {}
    return weights


def settings(name, **more):
    targets = sorted(layers(name))
    return LoraConfig(r=RANK, lora_alpha=ALPHA, **more).to_dict() | {"target_modules": targets}


def kohya(layer):
    return "lora_unet_" + layer.replace(".", "_")


def peft(name, folder):
    folder.mkdir(exist_ok=True)
    held = named(name, lambda layer: f"base_model.model.{layer}")
    save_file(held, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings(name)))


def peft_of_a_policy_with_an_old_one(name, folder):
    peft(name, folder)
    peft(name, folder / "old")
    wrong = {k: 9 * v for k, v in load_file(folder / "adapter_model.safetensors").items()}
    save_file(wrong, folder / "old" / "adapter_model.safetensors")


def with_metadata(name, folder):
    held = {f"transformer.{k}": v for k, v in settings(name).items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(held)}
    save_file(named(name, lambda layer: f"transformer.{layer}"), folder / FILE, metadata)


def plain(form, *kinds, alpha=True, file=FILE):
    def write(name, folder):
        save_file(named(name, form, kinds or ("lora_A", "lora_B"), alpha), folder / file)

    return write


DOWN_UP = ("lora_down", "lora_up")
READ = {  # how it is written, and the strength that it then has
    "peft": (peft, ALPHA / RANK),
    "peft with old": (peft_of_a_policy_with_an_old_one, ALPHA / RANK),
    "diffusers with metadata": (with_metadata, ALPHA / RANK),
    "diffusers": (plain(lambda n: f"transformer.{n}", alpha=False), 1.0),
    "diffusers with alphas": (plain(lambda n: f"transformer.{n}"), ALPHA / RANK),
    "ai-toolkit": (
        plain(lambda n: f"diffusion_model.{n}", alpha=False, file="my.safetensors"),
        1.0,
    ),
    "ComfyUI": (plain(lambda n: f"diffusion_model.{n}", *DOWN_UP), ALPHA / RANK),
    "bare": (plain(lambda n: n), ALPHA / RANK),
    "bare without alphas": (plain(lambda n: n, alpha=False), 1.0),
    "kohya": (plain(kohya, *DOWN_UP, file="my.safetensors"), ALPHA / RANK),
}


def delta(transformer, layer):
    """What an adapter adds to a layer's weight."""
    module = transformer.get_submodule(layer)
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    return module.scaling["default"] * (b @ a).detach()


def adapted(transformer):
    return {n for n, m in transformer.named_modules() if hasattr(m, "lora_A")}


@pytest.mark.parametrize("layout", READ)
@ROWS
def test_a_lora_has_its_strength_in_its_layers_and_nowhere_else(name, layout, tmp_path):
    write, strength = READ[layout]
    write(name, tmp_path)
    for trained in ({}, {"rank": RANK, "alpha": 2 * RANK}):
        ours = model(name)
        ours.load_lora(str(tmp_path), **trained)
        assert adapted(ours.transformer) == set(layers(name))
        for layer, (a, b) in layers(name).items():
            torch.testing.assert_close(
                delta(ours.transformer, layer), strength * (b @ a), rtol=1e-6, atol=1e-6
            )
            if trained:
                assert ours.transformer.get_submodule(layer).scaling["default"] == 2.0


def fused(prefix, *cut, kinds=DOWN_UP):
    """Write q, k and v as the original model's one layer; cut: (its name, the layers' names)."""

    def write(transformer, folder):
        torch.manual_seed(4)
        held, truth = {}, {}
        for original, parts in cut:
            shapes = [transformer.get_submodule(part).weight.shape for part in parts]
            a, b = torch.randn(RANK, shapes[0][1]), torch.randn(sum(s[0] for s in shapes), RANK)
            stem = prefix + (original.replace(".", "_") if prefix == "lora_unet_" else original)
            held |= {f"{stem}.{k}.weight": v for k, v in zip(kinds, (a, b), strict=True)}
            held[f"{stem}.alpha"] = torch.tensor(ALPHA)
            rows = b.split([s[0] for s in shapes])
            truth |= {part: ALPHA / RANK * (row @ a) for part, row in zip(parts, rows, strict=True)}
        save_file(held, folder / FILE)
        return truth

    return write


def qkv(block, *names):
    return tuple(f"{block}.{n}" for n in names or ("to_q", "to_k", "to_v"))


BLACK_FOREST = [
    ("double_blocks.0.img_attn.qkv", qkv("transformer_blocks.0.attn")),
    ("double_blocks.0.img_attn.proj", ("transformer_blocks.0.attn.to_out.0",)),
]
Z_IMAGE = [
    ("layers.0.attention.qkv", qkv("layers.0.attention")),
    ("layers.0.attention.out", ("layers.0.attention.to_out.0",)),
    ("layers.1.feed_forward.w1", ("layers.1.feed_forward.w1",)),
]
WAN = [
    (f"blocks.{block}.{attention}_attn.{short}", (f"blocks.{block}.attn{n}.{long}",))
    for block in range(2)
    for n, attention in ((1, "self"), (2, "cross"))
    for short, long in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
] + [
    (f"blocks.{block}.ffn.{n}", (f"blocks.{block}.ffn.net.{long}",))
    for block in range(2)
    for n, long in ((0, "0.proj"), (2, "2"))
]
ORIGINAL = {"flux": BLACK_FOREST, "flux2": BLACK_FOREST, "zimage": Z_IMAGE, "wan": WAN}
ORIGINAL_ROWS = [n for n in tiny.MODELS if n.startswith(tuple(ORIGINAL))]


@pytest.mark.parametrize("kinds", [DOWN_UP, ("lora_A", "lora_B")])
@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
@pytest.mark.parametrize("name", ORIGINAL_ROWS)
def test_the_original_names_and_fused_layers_are_read(name, prefix, kinds, tmp_path):
    ours = model(name)
    cut = ORIGINAL[max((k for k in ORIGINAL if name.startswith(k)), key=len)]
    truth = fused(prefix, *cut, kinds=kinds)(ours.transformer, tmp_path)
    ours.load_lora(str(tmp_path))
    assert adapted(ours.transformer) == set(truth)
    for layer, value in truth.items():
        torch.testing.assert_close(delta(ours.transformer, layer), value, rtol=1e-6, atol=1e-5)


def refuse(change):
    """A LoRA in diffusers' layout, something in it changed."""

    def write(name, folder):
        held = named(name, lambda layer: f"transformer.{layer}")
        save_file(change(held, sorted(layers(name))[0]), folder / FILE)

    return write


def without(held, *ends):
    return {k: v for k, v in held.items() if not k.endswith(ends)}


REFUSED = {
    "LoHa": (
        refuse(lambda held, n: held | {f"transformer.{n}.hada_w1_a": torch.ones(4, 4)}),
        "hada_w1_a; only a LoRA's A and B",
    ),
    "DoRA": (
        refuse(lambda held, n: held | {f"transformer.{n}.dora_scale": torch.ones(4, 1)}),
        "dora_scale; only",
    ),
    "a bias": (
        refuse(lambda held, n: held | {f"transformer.{n}.lora_B.bias": torch.ones(4)}),
        "lora_B.bias; only",
    ),
    "modules_to_save": (
        refuse(lambda held, n: held | {"transformer.proj_out.weight": torch.ones(4, 4)}),
        "proj_out.weight; only",
    ),
    "wrong width": (
        refuse(
            lambda held, n: {
                k: v[..., 1:].contiguous() if "_A" in k else v for k, v in held.items()
            }
        ),
        "lora_A has the shape",
    ),
    "a deeper model": (
        refuse(
            lambda held, n: {
                k.replace(".0.", ".57.").replace(".1.", ".57."): v for k, v in held.items()
            }
        ),
        "0 weights missing, . unknown, such as .*57",
    ),
    "half a pair": (
        refuse(lambda held, n: without(held, f"{n}.lora_B.weight")),
        "1 weights missing",
    ),
    "another strength in its metadata": (
        lambda name, folder: save_file(
            named(name, lambda layer: f"transformer.{layer}", alpha=True),
            folder / FILE,
            {
                "lora_adapter_metadata": json.dumps(
                    {f"transformer.{k}": v for k, v in (settings(name) | {"lora_alpha": 8}).items()}
                )
            },
        ),
        "says twice how strong",
    ),
    "original names that nobody knows": (
        refuse(lambda held, n: {k.replace(n, f"joint_blocks.0.x.{n}"): v for k, v in held.items()}),
        "0 weights missing, 1 unknown",
    ),
    "no transformer": (
        refuse(
            lambda held, n: {
                k.replace("transformer.", "text_encoder.", 1): v for k, v in held.items()
            }
        ),
        "such as none of a transformer",
    ),
    "nothing": (lambda name, folder: None, "it has no .safetensors file"),
    "a pickle": (
        lambda name, folder: (folder / "adapter_model.bin").write_bytes(b"pickle"),
        "is a pickle",
    ),
    "cut short": (
        lambda name, folder: (
            plain(lambda n: n)(name, folder),
            (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-9]),
        ),
        "cut short",
    ),
    "a git-lfs pointer": (
        lambda name, folder: (folder / FILE).write_text("version https://git-lfs.github.com/spec"),
        "git-lfs pointer",
    ),
    "PEFT without its config": (
        lambda name, folder: (peft(name, folder), (folder / "adapter_config.json").unlink()),
        "adapter_config.json is missing",
    ),
}


@pytest.mark.filterwarnings("ignore:.*of a text encoder")
@pytest.mark.parametrize("case", REFUSED)
@ROWS
def test_what_would_not_be_the_same_is_refused(name, case, tmp_path):
    write, message = REFUSED[case]
    write(name, tmp_path)
    with pytest.raises(ValueError, match=message):
        model(name).load_lora(str(tmp_path))


@pytest.mark.parametrize("prefix", ["text_encoder.text_model.", "lora_te1_"])
@ROWS
def test_of_a_text_encoder_s_part_it_is_said_that_it_is_left_out(name, prefix, tmp_path):
    held = named(name, lambda layer: f"transformer.{layer}")
    more = {f"{prefix}a.lora_A.weight": torch.ones(4, 4), f"{prefix}a.alpha": torch.tensor(2.0)}
    save_file(held | more, tmp_path / FILE)
    ours = model(name)
    with pytest.warns(UserWarning, match="2 weights of a text encoder are left out"):
        ours.load_lora(str(tmp_path))
    assert adapted(ours.transformer) == set(layers(name))
