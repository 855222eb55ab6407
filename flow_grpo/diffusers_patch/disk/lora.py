"""A LoRA's file, as trainers write it: read, put in place, written so that all read the same."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from flow_grpo.diffusers_patch.disk import files, settings
from flow_grpo.diffusers_patch.disk.settings import TEXT, Settings

A, B, ALPHA = ("lora_A", "lora_down", "lora.down"), ("lora_B", "lora_up", "lora.up"), ("alpha",)
KIND = re.compile(rf"(.+)\.({'|'.join(A + B + ALPHA)})(\.default)?(\.weight)?")
PREFIX = re.compile(
    r"^((base_model\.model\.|model\.|diffusion_model\.|transformer\.)+|lora_(unet|transformer)_)"
)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Parts = dict[str, dict[str, Tensor]]  # by layer: "A" (rank, in), "B" (out, rank), "alpha"


@dataclass
class Lora:
    """What a layer of a transformer adds: alpha / rank x B A."""

    file: Path
    parts: Parts  # by the transformer's own names, fp32
    alphas: dict[str, float]


def read(path: str, transformer: nn.Module, stock: type[DiffusionPipeline]) -> Lora:
    """Read a LoRA in any layout whose names are the transformer's own or stock can convert.

    path: a file, its folder or a hub id. Raises ValueError if a weight would be left out.
    """
    file = files.lora_file(path)
    is_peft = file.name == files.LORA_FILES[1]
    said = settings.read(file, files.header(file).get("__metadata__", {}), is_peft)
    tensors = files.tensors(file)
    if text := [key for key in tensors if TEXT.match(key)]:
        warnings.warn(f"{file}: {len(text)} weights of a text encoder are left out.", stacklevel=2)
    parts, odd = _parts({key: tensors[key] for key in tensors if key not in text})
    if odd:
        raise ValueError(
            f"the LoRA {str(file)!r} has {len(odd)} weights such as {odd[0]}; only a LoRA's A and "
            f"B with a number alpha are read, in finite floats, no LoHa, LoKr, DoRA, bias or "
            f"modules_to_save. Merge it into config.pretrained.model, or train it without them."
        )
    known = {name for name, each in transformer.named_modules() if isinstance(each, LAYERS)}
    missing = [f"{name}.lora_{k}.weight" for name in parts for k in "AB" if k not in parts[name]]
    named, unknown = _named(parts, known)
    if unknown and not missing and (converted := _converted(parts, known, stock)):
        named, unknown = converted, []
    if is_peft and said:
        wanted = (name for name in known if said.wants(name))
        missing += [f"{name}.lora_A.weight" for name in sorted(wanted) if name not in named]
    if missing or unknown or not named:
        raise ValueError(
            f"the LoRA {str(file)!r} does not fit {type(transformer).__name__}: {len(missing)} "
            f"weights missing, {len(unknown)} unknown, such as "
            f"{(missing + unknown or ['none of a transformer'])[0]}. A LoRA of "
            f"config.pretrained.model's transformer is needed."
        )
    return Lora(file, named, {name: _alpha(file, name, named[name], said) for name in named})


def put(lora: Lora, transformer: nn.Module, rank: int | None, alpha: float | None) -> None:
    """Add a LoRA as the adapter "default", fp32. Raises ValueError for another rank or width.

    rank, alpha: those to train with; B is scaled so that the adapter does the same. None: its own.
    """
    ranks = {name: len(each["A"]) for name, each in lora.parts.items()}
    usual, rank_pattern = _usual(ranks)
    if rank not in (None, usual):
        raise ValueError(
            f"config.train.lora_rank={rank}, but that of the LoRA in {str(lora.file)!r} is {usual}."
            f" Set config.train.lora_rank={usual}."
        )
    alphas = {name: alpha * ranks[name] / rank for name in ranks} if rank else lora.alphas
    lora_alpha, alpha_pattern = _usual(alphas)
    config = LoraConfig(
        r=usual,
        lora_alpha=lora_alpha,
        target_modules="|".join(map(re.escape, ranks)),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
    )
    values = {name: _values(lora, name, transformer, alphas[name]) for name in ranks}
    transformer.add_adapter(config)
    for name, each in values.items():
        layer = transformer.get_submodule(name)
        for kind, value in each.items():
            weight = getattr(layer, f"lora_{kind}")["default"].weight
            weight.data = value.to(weight.device)


def _values(lora: Lora, name: str, transformer: nn.Module, alpha: float) -> dict[str, Tensor]:
    """Return a layer's A and B as they do the same with another alpha. Raises ValueError."""
    weight, rank = transformer.get_submodule(name).weight, len(lora.parts[name]["A"])
    shapes = {"A": (rank, *weight.shape[1:]), "B": (len(weight), rank, *(1,) * (weight.ndim - 2))}
    values = {
        "A": lora.parts[name]["A"],
        "B": lora.parts[name]["B"] * (lora.alphas[name] / (alpha or 1.0)),
    }
    for kind, value in values.items():
        if value.shape != shapes[kind] or not value.isfinite().all():
            raise ValueError(
                f"the LoRA {str(lora.file)!r} does not fit {type(transformer).__name__}: "
                f"{name}.lora_{kind} has the shape {tuple(value.shape)}, not {shapes[kind]}, or is "
                f"not finite. A LoRA of config.pretrained.model is needed."
            )
    return values


def write(
    values: dict[str, Tensor], transformer: nn.Module, stock: type[DiffusionPipeline], folder: Path
) -> None:
    """Write a LoRA for diffusers and for PEFT, alpha / rank multiplied into B for all readers.

    values: by its parameters' names.
    """
    weights = {}
    for key, value in values.items():
        name, kind = key.removesuffix(".default.weight").rsplit(".", 1)
        scale = transformer.get_submodule(name).scaling["default"] if kind == "lora_B" else 1.0
        weights[f"{name}.{kind}.weight"] = (value * scale).contiguous()
    ranks = {
        k.removesuffix(".lora_A.weight"): len(v) for k, v in weights.items() if ".lora_A." in k
    }
    usual, pattern = _usual(ranks)
    config = LoraConfig(r=usual, lora_alpha=usual, rank_pattern=pattern, alpha_pattern=pattern)
    settings = config.to_dict() | {"target_modules": sorted(ranks), "inference_mode": True}
    stock.save_lora_weights(
        folder, transformer_lora_layers=weights, transformer_lora_adapter_metadata=dict(settings)
    )
    packed = {f"base_model.model.{key}": value for key, value in weights.items()}
    save_file(packed, folder / files.LORA_FILES[1], {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True))


def _usual(values: dict[str, float]) -> tuple[float, dict[str, float]]:
    """The commonest of the layers' values, and a pattern for PEFT of the others'."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {f"^{re.escape(name)}": v for name, v in values.items() if v != usual}


def _parts(tensors: dict[str, Tensor]) -> tuple[Parts, list[str]]:
    """Bring a file's tensors together by layer; name those that are no plain LoRA's."""
    parts, odd = {}, []
    for key, value in tensors.items():
        found = KIND.fullmatch(key)
        kind = found and ("A" if found[2] in A else "B" if found[2] in B else "alpha")
        matrix = value.ndim > 1 and value.numel() and value.is_floating_point()
        good = value.numel() == 1 if kind == "alpha" else matrix
        if kind and good and (value := value.float()).isfinite().all():
            parts.setdefault(found[1], {})[kind] = value
        else:
            odd.append(key)
    return parts, odd


def _named(parts: Parts, known: set[str]) -> tuple[Parts, list[str]]:
    """Name layers as the transformer does, whatever stands before and for the dots."""
    flat, named, unknown = {name.replace(".", "_"): name for name in known}, {}, []
    for key, each in parts.items():
        name = flat.get(PREFIX.sub("", key).replace(".", "_"))
        if name and name not in named:
            named[name] = each
        else:
            unknown.append(key)
    return named, unknown


def _converted(parts: Parts, known: set[str], stock: type[DiffusionPipeline]) -> Parts | None:
    """Let diffusers translate names and cut fused layers; None if it can't do so for all."""

    def flat(key: str) -> str:
        return "lora_unet_" + PREFIX.sub("", key).replace(".", "_")

    kohya = ("lora_down", "lora_up")
    for stem, (down, up) in ((str, ("lora_A", "lora_B")), (str, kohya), (flat, kohya)):
        tensors = {}
        for key, each in parts.items():
            rank = torch.tensor(float(len(each["A"])))
            tensors[f"{stem(key)}.{down}.weight"] = each["A"].clone()
            tensors[f"{stem(key)}.{up}.weight"] = each["B"] * (each.get("alpha", rank) / rank)
            if down == "lora_down":  # some of its converters need one
                tensors[f"{stem(key)}.alpha"] = rank
        try:
            made, odd = _parts(stock.lora_state_dict(tensors))
        except Exception:  # it has many ways to say that it does not know a layout
            continue
        named, unknown = _named(made, known)
        if named and not unknown and not odd:
            return named
    return None


def _alpha(file: Path, name: str, parts: dict[str, Tensor], said: Settings | None) -> float:
    rank = len(parts["A"])
    own = float(parts.get("alpha", rank))
    if said is None:
        return own
    stated = said.alpha_of(name, rank)
    if "alpha" in parts and own != stated:
        raise ValueError(
            f"the LoRA {str(file)!r} says twice how strong {name} is: its alpha is {own:g} by its "
            f"weight, {stated:g} by its metadata. Take one of them out."
        )
    return stated
