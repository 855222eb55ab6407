"""Which files of weights are there, and are they whole."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache

LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
POINTER = b"version https://git-lfs"


def header(file: Path) -> dict:
    """Return a .safetensors file's header. Raises ValueError if the file is not whole."""
    _refuse_pointer(file)
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        text = opened.read(length) if length < size else b""
    try:
        held = json.loads(text)
        ends = [each["data_offsets"][1] for key, each in held.items() if key != "__metadata__"]
    except (ValueError, AttributeError, KeyError, TypeError):
        held, ends = {}, [size]
    if size != 8 + length + max(ends, default=0):
        raise ValueError(f"{file} ({size:,} bytes) is cut short or damaged. Fetch it again.")
    return held


def check_part(folder: Path, has_weights: bool = True) -> str:
    """Return what a part's weights have before .safetensors, such as fp16; "" for most.

    Raises ValueError, with the file, if one is missing or not whole.
    """
    if not folder.is_dir() or has_weights and not (folder / "config.json").is_file():
        missing = folder / "config.json" if folder.is_dir() else folder
        raise ValueError(f"{missing} is missing. Fetch it again.")
    for file in folder.iterdir():
        _refuse_pointer(file)
    kind, names = _weights(folder)
    for name in names:
        header(folder / name)
    ending = f".safetensors.index.{kind}.json" if kind else ".safetensors.index.json"
    indexes = [file for file in folder.iterdir() if file.name.endswith(ending)]
    for index in indexes:
        for name in json.loads(index.read_text())["weight_map"].values():
            if name not in names:
                raise ValueError(f"{folder / name} is missing. Fetch it again.")
    if not indexes and names and all("-of-" in name for name in names):
        raise ValueError(f"{folder} lacks the index of its weights, *{ending}. Fetch it again.")
    if has_weights and not names and not list(folder.glob("*.bin")):
        raise ValueError(f"{folder} has no .safetensors file. Fetch it again.")
    return kind


def variant(path: str, revision: str, parts: Iterable[str]) -> str | None:
    """Return the variant to ask a pipeline's loader for. Raises ValueError if there are several."""
    root = Path(path)
    if not root.is_dir():
        cached = try_to_load_from_cache(path, "model_index.json", revision=revision)
        root = Path(cached if isinstance(cached, str) else "/").parent
    found = {_weights(root / part)[0] for part in parts} - {""}
    if len(found) > 1:
        raise ValueError(f"{root} has parts as {sorted(found)}. Keep one such kind of files.")
    return found.pop() if found else None


def lora_file(path: str) -> Path:
    """Return a LoRA's file. path: it, its folder or a hub id. Raises ValueError if it is none."""
    found = Path(path)
    if not found.exists() and not path.startswith((".", "/")) and path.count("/") == 1:
        wanted = ["*.safetensors", "adapter_config.json"]
        try:
            found = Path(snapshot_download(path, allow_patterns=wanted, ignore_patterns="*/*"))
        except (OSError, ValueError) as error:
            raise ValueError(f"there is no such file, folder or hub id ({error}).") from None
    if not found.exists():
        raise ValueError("there is no such file or folder.")
    files = [found / name for name in LORA_FILES if (found / name).is_file()]
    files = files or ([found] if found.is_file() else sorted(found.glob("*.safetensors")))
    if not files:
        raise ValueError(
            "the folder has no .safetensors file. A LoRA in diffusers' or PEFT's format is needed, "
            "such as checkpoints/checkpoint-<step>/lora of a run; a .bin or .pt file is a pickle "
            "and not read, so load it and save it as .safetensors."
        )
    if files[0].suffix != ".safetensors" or len(files) > 1 and files[0].name not in LORA_FILES:
        names = [file.name for file in files]
        raise ValueError(f"one .safetensors file is needed, not {names}. Name the LoRA's file.")
    return files[0]


def _weights(folder: Path) -> tuple[str, list[str]]:
    """The variant of a part's files, "" where plain ones are there, and its files' names."""
    names = [file.name for file in folder.glob("*.safetensors")]
    kinds = ["".join(name.split(".")[1:-1]).partition("-")[0] for name in names]
    kind = min(kinds, default="")  # "" comes first
    return kind, [name for name, each in zip(names, kinds, strict=True) if each == kind]


def _refuse_pointer(file: Path) -> None:
    if file.is_file():
        with file.open("rb") as opened:
            if opened.read(len(POINTER)) == POINTER:
                raise ValueError(f"{file} is a git-lfs pointer, not the file. Run: git lfs pull")
