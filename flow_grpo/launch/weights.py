"""Trained weights on disk, a run's or anyone's in diffusers' format."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from flow_grpo.diffusers_patch.disk import files
from flow_grpo.diffusers_patch.registry import INDEX_FILES
from flow_grpo.inputs import json_object

BASE = "base"  # the word for a model as it was before training


@dataclass(frozen=True)
class Weights:
    """What is added to a base, or put in its transformer's place."""

    name: str  # as it was asked for
    kind: str  # base | lora | transformer
    path: Path = Path()  # a LoRA's folder or file, or a transformer's folder


def find(name: str) -> Weights:
    """Find what to load.

    name: "base"; a run's checkpoint, or its lora/ or transformer/; a LoRA's folder or .safetensors
    file; a transformer's folder. Raises ValueError if it is none of these.
    """
    path = Path(os.path.expanduser(name))
    if name == BASE:
        return Weights(name, "base")
    if path.is_file() and path.suffix == ".safetensors":
        return Weights(name, "lora", path)
    if any((path / name).is_file() for name in INDEX_FILES):
        raise ValueError(
            f"{name!r} is a whole pipeline: set --config.pretrained.model to it, or name its "
            f"transformer/ to evaluate that with the rest of config.pretrained.model."
        )
    for folder in (path, path / "lora", path / "transformer"):
        if (folder / "config.json").is_file() and list(folder.glob("*.safetensors*")):
            return Weights(name, "transformer", folder)
        if found := _lora(folder):
            return Weights(name, "lora", found)
    raise ValueError(
        f"{name!r} holds neither a LoRA nor a transformer in diffusers' format. Needed is the word "
        f"'base', a folder logs/<run_name>/checkpoints/checkpoint-<step>, its lora/ or "
        f"transformer/, or another such folder or a LoRA's .safetensors file."
    )


def stamps(weights: Weights) -> list[list]:
    """Return the names, sizes and times of change of the files that hold the weights."""
    path = weights.path
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    held = [] if weights.kind == "base" else [(each, each.stat()) for each in found]
    return [[each.name, stat.st_size, stat.st_mtime_ns] for each, stat in held]


def check_class(weights: Weights, model_index: dict) -> None:
    """Raise ValueError if a transformer is of another class than the base's."""
    if weights.kind != "transformer":
        return
    found = json_object(weights.path / "config.json").get("_class_name")
    needed = model_index["transformer"][1]
    if found != needed:
        raise ValueError(
            f"{weights.name!r} is a {found}, but the transformer of config.pretrained.model is a "
            f"{needed}. Set --config.pretrained.model to the base of this checkpoint."
        )
    check_part(weights.path)


def check_part(folder: Path, has_weights: bool = True) -> None:
    """Raise ValueError, with the file, if one of a model's part is missing or not whole."""
    if not folder.is_dir() or has_weights and not (folder / "config.json").is_file():
        missing = folder / "config.json" if folder.is_dir() else folder
        raise ValueError(f"{missing} is missing. Fetch it again.")
    for file in filter(Path.is_file, folder.iterdir()):
        files.refuse_pointer(file)
    kind, names = files.weights(folder)
    for name in names:
        files.header(folder / name)
    ending = f".safetensors.index.{kind}.json" if kind else ".safetensors.index.json"
    indexes = [file for file in folder.iterdir() if file.name.endswith(ending)]
    for index in indexes:
        where = json_object(index).get("weight_map")
        if not isinstance(where, dict):
            raise ValueError(f"{index} is damaged: it has no weight_map. Fetch it again.")
        for name in where.values():
            if name not in names:
                raise ValueError(f"{folder / name} is missing. Fetch it again.")
    if not indexes and names and all("-of-" in name for name in names):
        raise ValueError(f"{folder} lacks the index of its weights, *{ending}. Fetch it again.")
    if has_weights and not names and not list(folder.glob("*.bin")):
        raise ValueError(f"{folder} has no .safetensors file. Fetch it again.")


def check_file(file: Path) -> None:
    """Raise ValueError if a file of weights is missing or not whole."""
    if not file.is_file():
        raise ValueError(f"{file} is missing. Fetch it again.")
    files.header(file)


def run_config(weights: Weights) -> dict:
    """Return the config of the run that wrote a checkpoint; {} for weights from elsewhere."""
    folder = Path(os.path.expanduser(weights.name)).resolve()
    for parent in (folder, *folder.parents[:2]):
        written = parent.parent.parent / "config.json"
        if parent.name.startswith("checkpoint-") and written.is_file():
            return json_object(written)
    return {}


def _lora(folder: Path) -> Path | None:
    """The folder, if its LoRA has the usual name, or the only file; a run's state is none."""
    if any((folder / name).is_file() for name in files.LORA_FILES):
        return folder
    found = list(folder.glob("*.safetensors"))
    is_state = (folder / "trainer.json").is_file()
    return found[0] if len(found) == 1 and not is_state else None
