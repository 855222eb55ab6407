"""A LoRA's file, as trainers write it: read, put in place, written so that all read the same."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flow_grpo.diffusers_patch.disk import files

A, B, ALPHA = ("lora_A", "lora_down", "lora.down"), ("lora_B", "lora_up", "lora.up"), ("alpha",)
KIND = re.compile(rf"(.+)\.({'|'.join(A + B + ALPHA)})(\.default)?(\.weight)?")
PREFIX = re.compile(
    r"^((base_model\.model\.|model\.|diffusion_model\.|transformer\.)+|lora_(unet|transformer)_)"
)
TEXT = re.compile(r"(base_model\.model\.)?(text_encoder|lora_te)")
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
METADATA = "lora_adapter_metadata"  # diffusers' name
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
    settings = _settings(file, files.header(file).get("__metadata__", {}))
    tensors = load_file(file)
    if text := [key for key in tensors if TEXT.match(key)]:
        warnings.warn(f"{file}: {len(text)} weights of a text encoder are left out.", stacklevel=2)
    parts, odd = _parts({key: tensors[key] for key in tensors if key not in text})
    if odd:
        raise ValueError(
            f"the LoRA {str(file)!r} has {len(odd)} weights such as {odd[0]}; only a LoRA's A and "
            f"B with a number alpha are read, no LoHa, LoKr, DoRA, bias or modules_to_save. Merge "
            f"it into config.pretrained.model, or train it without them."
        )
    known = {name for name, each in transformer.named_modules() if isinstance(each, LAYERS)}
    missing = [f"{name}.lora_{k}.weight" for name in parts for k in "AB" if k not in parts[name]]
    named, unknown = _named(parts, known)
    if unknown and not missing and (converted := _converted(parts, known, stock)):
        named, unknown = converted, []
    if file.name == files.LORA_FILES[1] and settings:
        wanted = (name for name in known if check_target_module_exists(settings, name))
        missing += [f"{name}.lora_A.weight" for name in sorted(wanted) if name not in named]
    if missing or unknown or not named:
        raise ValueError(
            f"the LoRA {str(file)!r} does not fit {type(transformer).__name__}: {len(missing)} "
            f"weights missing, {len(unknown)} unknown, such as "
            f"{(missing + unknown or ['none of a transformer'])[0]}. A LoRA of "
            f"config.pretrained.model's transformer is needed."
        )
    return Lora(file, named, {name: _alpha(file, name, named[name], settings) for name in named})


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
    transformer.add_adapter(config)
    for name, each in lora.parts.items():
        layer = transformer.get_submodule(name)
        for kind, factor in {"A": 1.0, "B": lora.alphas[name] / (alphas[name] or 1.0)}.items():
            weight, value = getattr(layer, f"lora_{kind}")["default"].weight, each[kind] * factor
            if weight.shape != value.shape:
                raise ValueError(
                    f"the LoRA {str(lora.file)!r} does not fit {type(transformer).__name__}: "
                    f"{name}.lora_{kind} has the shape {tuple(value.shape)}, not "
                    f"{tuple(weight.shape)}. A LoRA of config.pretrained.model is needed."
                )
            weight.data = value.to(weight.device)


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


def _settings(file: Path, metadata: dict) -> LoraConfig | None:
    """What stands in a file's metadata or beside it."""
    beside = file.with_name("adapter_config.json")
    if METADATA in metadata:
        stated = json.loads(metadata[METADATA])
        given = {k.removeprefix("transformer."): stated[k] for k in stated if not TEXT.match(k)}
    elif file.name != files.LORA_FILES[1]:
        return None
    elif beside.is_file():
        given = json.loads(beside.read_text())
    else:
        raise ValueError(f"{beside} is missing, which says how strong the LoRA is. Put it there.")
    known = {each.name for each in fields(LoraConfig)}
    return LoraConfig(**{k: v for k, v in given.items() if k in known}) if given else None


def _parts(tensors: dict[str, Tensor]) -> tuple[Parts, list[str]]:
    """Bring a file's tensors together by layer; name those that are no plain LoRA's."""
    parts, odd = {}, []
    for key, value in tensors.items():
        found, value = KIND.fullmatch(key), value.float()
        kind = found and ("A" if found[2] in A else "B" if found[2] in B else "alpha")
        good = value.numel() == 1 and bool(value.isfinite()) if kind == "alpha" else value.ndim > 1
        if kind and good:
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


def _alpha(file: Path, name: str, parts: dict[str, Tensor], settings: LoraConfig | None) -> float:
    rank = len(parts["A"])
    own = float(parts.get("alpha", rank))
    if settings is None:
        return own
    pattern = settings.alpha_pattern or {}
    stated = pattern.get(get_pattern_key(pattern, name), settings.lora_alpha)
    stated *= math.sqrt(rank) if settings.use_rslora else 1
    if "alpha" in parts and own != stated:
        raise ValueError(
            f"the LoRA {str(file)!r} says twice how strong {name} is: its alpha is {own:g} by its "
            f"weight, {stated:g} by its metadata. Take one of them out."
        )
    return stated
