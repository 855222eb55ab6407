"""What a model's files tell before a weight is loaded: are they here, do they suit."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from ml_collections import ConfigDict

from flow_grpo.diffusers_patch.base import ENCODERS, PatchedPipeline
from flow_grpo.diffusers_patch.disk import files
from flow_grpo.diffusers_patch.registry import FAMILIES, INDEX_FILES
from flow_grpo.evaluation.evaluate import sizes
from flow_grpo.inputs import json_object
from flow_grpo.launch.weights import check_file, check_part
from flow_grpo.prompts import Prompt

WITHOUT_WEIGHTS = ("tokenizer", "scheduler", "processor", "feature_extractor")


def check(config: ConfigDict) -> None:
    """Raise ValueError for a model that is not there, a size it can't draw, a LoRA that is none."""
    path = config.pretrained.model
    if not path:
        raise ValueError(
            "config.pretrained.model is empty: a diffusers folder or hub id is needed, "
            "for example --config.pretrained.model=stabilityai/stable-diffusion-3.5-medium."
        )
    if os.path.isdir(path):
        if not _index_file(config):
            raise ValueError(
                f"config.pretrained.model={path!r}: the folder has no {' or '.join(INDEX_FILES)}. "
                f"The top folder of a pipeline is needed, as save_pretrained writes it."
            )
    elif path.startswith((".", "/")) or path.count("/") != 1:
        raise ValueError(
            f"config.pretrained.model={path!r}: there is no such folder, and it is no hub id "
            f"(owner/name). Correct the path; it is relative to {os.getcwd()}."
        )
    elif constants.HF_HUB_OFFLINE and (missing := to_download(config)):
        raise ValueError(f"{missing} HF_HUB_OFFLINE forbids to do so now.")
    if os.path.isdir(path):
        _check_parts(config)
    _check_size(config)
    if path := config.train.lora_path:
        train = config.train
        check_lora(config, "config.train.lora_path", path, train.lora_rank, train.lora_alpha)


def to_download(config: ConfigDict) -> str:
    """Say how to get a model that is not on this machine; "" if it is."""
    repo = config.pretrained.model
    if _index_file(config):
        return ""
    revision = config.pretrained.revision
    chosen = "" if revision == "main" else f" --revision {revision}"
    others = " or ".join(name for name in INDEX_FILES if name != "model_index.json")
    return (
        f"config.pretrained.model={repo!r} is not on this machine. To download it: "
        f'hf download {repo}{chosen} --include model_index.json --include "*/*" '
        f'--exclude "text_encoders/*", or all of one with {others}. If that is refused, the model '
        f"is gated: accept its licence on https://huggingface.co/{repo}, then `hf auth login`."
    )


def index(config: ConfigDict) -> dict:
    """Return the pipeline's model_index.json, downloaded where it is not on this machine."""
    path, revision = config.pretrained.model, config.pretrained.revision
    found, errors = _index_file(config), []
    for name in () if found else INDEX_FILES:
        try:
            found = Path(hf_hub_download(path, name, revision=revision))
            break
        except OSError as error:
            errors.append(error)
    if not found:
        raise ValueError(f"{to_download(config)} Reading its model_index.json: {errors[0]}")
    return INDEX_FILES[found.name].index(found)


def family(config: ConfigDict) -> type[PatchedPipeline]:
    """Return the class that patches this model. Raises ValueError if there is none."""
    name = str(index(config).get("_class_name"))
    if name not in FAMILIES:
        raise ValueError(
            f"config.pretrained.model={config.pretrained.model!r} is a {name}; there are "
            f"{', '.join(FAMILIES)} (flow_grpo/diffusers_patch/registry.py)."
        )
    return FAMILIES[name]


def _check_parts(config: ConfigDict) -> None:
    """Raise ValueError for a file of a model's folder that is missing or not whole."""
    path = Path(config.pretrained.model)
    try:
        if single := _known(config).single_files:
            for name in single:
                check_file(path / name)
            return
        for name, value in index(config).items():
            part = path / name
            unread = config.encoders == "precompute" and name.startswith(ENCODERS)
            if isinstance(value, list) and any(value[:1]) and (part.is_dir() or not unread):
                check_part(part, not name.startswith(WITHOUT_WEIGHTS))
    except ValueError as error:
        raise ValueError(f"config.pretrained.model={str(path)!r}: {error}") from None


def _check_size(config: ConfigDict) -> None:
    sides = [
        (f"config.{'resolution' if config[key] is None else key}", config[key] or config.resolution)
        for key in ("height", "width")
    ]
    sides += [("config.sample.eval_sizes", n) for e in sizes(config) for n in (e.height, e.width)]
    _check_sides(config, sides)


def check_prompts(config: ConfigDict, prompts: list[Prompt]) -> None:
    """Raise ValueError naming the line of a size that the model can't draw."""
    first = {prompt.size: prompt.where for prompt in reversed(prompts) if prompt.size}
    named = [(f'{where}: "size"', n) for s, where in first.items() for n in (s.height, s.width)]
    _check_sides(config, named)


def _check_sides(config: ConfigDict, sides: list[tuple[str, int]]) -> None:
    limits = _known(config).sides(_read(config, "vae"), _transformer(config))
    if not limits:
        return  # other models are asked once they are loaded
    multiple, largest = limits
    for key, side in sides:
        if not 0 < side <= largest or side % multiple:
            nearest = min(max(round(side / multiple), 1) * multiple, largest)
            raise ValueError(
                f"{key}={side}: this model draws sides that are multiples of {multiple} "
                f"pixels{f', at most {largest}' if side > largest else ''}. "
                f"The nearest is {nearest}."
            )


def check_lora(config: ConfigDict, key: str, path: str, *trained: float) -> None:
    """Raise ValueError for a LoRA that can't be read or is of another model.

    key: what names it. trained: the rank and the alpha with which it is to be trained.
    """
    try:
        files.lora_file(path)
        if part := _transformer(config):  # otherwise the model is to be downloaded first
            family(config).check_lora(path, part, *trained)
    except ValueError as error:
        raise ValueError(f"{key}={path!r}: {error}") from None


def _known(config: ConfigDict) -> type[PatchedPipeline]:
    """Return the class of a model on this machine; what all have in common where it is unknown."""
    found = _index_file(config)
    name = found and INDEX_FILES[found.name].index(found).get("_class_name")
    return FAMILIES.get(str(name), PatchedPipeline)


def _transformer(config: ConfigDict) -> dict:
    """Return the transformer's config, {} if it is not on this machine."""
    return _known(config).transformer_config(lambda name: file_of(config, name))


def _index_file(config: ConfigDict) -> Path | None:
    return next(filter(None, (file_of(config, name) for name in INDEX_FILES)), None)


def _read(config: ConfigDict, part: str) -> dict:
    """Return a component's config.json, {} if it is not on this machine."""
    found = file_of(config, f"{part}/config.json")
    return json_object(found) if found else {}


def file_of(config: ConfigDict, name: str) -> Path | None:
    """Return the path of a model's file, None if it is not on this machine."""
    path, revision = config.pretrained.model, config.pretrained.revision
    if os.path.isdir(path):
        found = Path(path) / name
        return found if found.is_file() else None
    cached = try_to_load_from_cache(path, name, revision=revision)
    return Path(cached) if isinstance(cached, str) else None
