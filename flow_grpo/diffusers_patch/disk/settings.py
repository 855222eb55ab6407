"""What is said of a LoRA beside its weights, as PEFT says it: how strong it is, and in what."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

METADATA = "lora_adapter_metadata"  # diffusers' name
BESIDE = "adapter_config.json"
TEXT = re.compile(r"(base_model\.model\.)?(text_encoder|lora_te)")
OTHER = (  # what makes of A and B something else than alpha / rank x B A
    *("use_dora", "use_qalora", "use_bdlora", "layer_replication", "alora_invocation_tokens"),
    *("kasa_config", "monteclora_config"),
)
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to start that change the base
MAX_REPEATS = 6  # of a pattern; each may take as many steps as a name has letters


@dataclass(frozen=True)
class Settings:
    """What is known of all layers and of some."""

    alpha: float = 8  # PEFT's default
    alphas: dict[str, float] = field(default_factory=dict)  # by a pattern of names
    targets: str | list[str] | None = None  # a pattern, or how names end
    excluded: str | list[str] | None = None
    by_rank_root: bool = False  # alpha / sqrt(rank) instead of alpha / rank

    def alpha_of(self, name: str, rank: int) -> float:
        found = (v for k, v in self.alphas.items() if re.match(rf"(.*\.)?({k})$", name))
        return next(found, self.alpha) * (math.sqrt(rank) if self.by_rank_root else 1)

    def wants(self, name: str) -> bool:
        """Whether a layer of this name must have weights, as far as that is known."""
        return _is_named(name, self.targets) and not _is_named(name, self.excluded)


def read(file: Path, metadata: dict, needs_settings: bool) -> Settings | None:
    """Return what the metadata of a LoRA's file says, or what stands beside a file of PEFT.

    Raises ValueError naming the file if it can't be meant for a LoRA, or is needed and not there.
    """
    beside = file.with_name(BESIDE)
    if METADATA not in metadata and not needs_settings:
        return None
    if METADATA not in metadata and not beside.is_file():
        raise ValueError(f"{beside} is missing, which says how strong the LoRA is. Put it there.")
    try:
        if METADATA in metadata:
            stated = _object(metadata[METADATA])
            given = {k.removeprefix("transformer."): stated[k] for k in stated if not TEXT.match(k)}
            return _settings(given) if given else None
        return _settings(_object(beside.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError, OSError, RecursionError) as error:
        where = f"{str(file)!r} in its metadata" if METADATA in metadata else repr(str(beside))
        raise ValueError(
            f"the settings of a LoRA, {where}, can't be used ({error}). Put them right, as PEFT "
            f"writes them, or save the LoRA anew."
        ) from None


def _object(text: str) -> dict:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"it is {value!r:.60}, and an object is needed")
    return value


def _settings(given: dict) -> Settings:
    if given.get("peft_type") not in (None, "LORA"):
        raise ValueError(f"peft_type is {given['peft_type']!r:.60}, and only a LORA is read")
    if odd := [key for key in OTHER if given.get(key)]:
        raise ValueError(f"{odd[0]} is {given[odd[0]]!r:.60}, and only a plain LoRA is read")
    start = str(given.get("init_lora_weights") or "")
    if start.lower().startswith(MOVES_BASE):
        raise ValueError(
            f"init_lora_weights is {start!r:.60}, which changes the base model's weights; convert "
            f"it to a plain LoRA by PEFT's save_pretrained(path_initial_model_for_weight_conversion"
        )
    by_rank_root = given.get("use_rslora") or False
    if not isinstance(by_rank_root, bool):
        raise ValueError(f"use_rslora is {by_rank_root!r:.60}, and true or false is needed")
    alphas = given.get("alpha_pattern") or {}
    if not isinstance(alphas, dict):
        raise ValueError(f"alpha_pattern is {alphas!r:.60}, and numbers by pattern are needed")
    return Settings(
        _number("lora_alpha", given.get("lora_alpha", Settings.alpha)),
        {
            _tame("alpha_pattern", key): _number(f"alpha_pattern of {key!r:.60}", value)
            for key, value in alphas.items()
        },
        None if given.get("layers_to_transform") else _names("target_modules", given),
        _names("exclude_modules", given),
        by_rank_root,
    )


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
        raise ValueError(f"{key} is {value!r:.60}, and a number is needed")
    return value


def _names(key: str, given: dict) -> str | list[str] | None:
    value = given.get(key)
    if isinstance(value, str):
        return _tame(key, value)
    if not isinstance(value, list | None) or not all(isinstance(each, str) for each in value or ()):
        raise ValueError(f"{key} is {value!r:.60}, and a list of names or a pattern is needed")
    return value


def _tame(key: str, pattern: str) -> str:
    """Return a regular expression that finds its end soon, whatever it is tried on."""
    repeats = re.findall(r"(?<!\\)(?<!\()[*+?{]", pattern)
    if len(repeats) > MAX_REPEATS or re.search(r"\)[*+?{]", pattern):
        raise ValueError(f"{key} is {pattern!r:.60}: write the names out instead of repeats")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{key} is {pattern!r:.60}, no pattern: {error}") from None
    return pattern


def _is_named(name: str, known: str | list[str] | None) -> bool:
    if isinstance(known, str):
        return known != "all-linear" and bool(re.fullmatch(known, name))
    return any(name == each or name.endswith(f".{each}") for each in known or ())
