"""Which files of weights are there, and are they whole."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
POINTER = b"version https://git-lfs"


def refuse_pointer(file: Path) -> None:
    with file.open("rb") as opened:
        if opened.read(len(POINTER)) == POINTER:
            raise ValueError(f"{file} is a git-lfs pointer, not the file. Run: git lfs pull")


def header(file: Path) -> dict:
    """Return a .safetensors file's header. Raises ValueError if the file is not whole."""
    refuse_pointer(file)
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        text = opened.read(length) if length < size else b""
    try:
        held = json.loads(text)
        ends = [each["data_offsets"][1] for key, each in held.items() if key != "__metadata__"]
        whole = size == 8 + length + max(ends, default=0)
        whole = whole and isinstance(held.get("__metadata__", {}), dict)
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{file} ({size:,} bytes) is cut short or damaged. Fetch it again.")
    return held


def tensors(file: Path) -> dict[str, Tensor]:
    """Read a .safetensors file. Raises ValueError naming it if it is damaged."""
    try:
        return load_file(file)
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}). Fetch it again.") from None


def weights(folder: Path) -> tuple[str, list[str]]:
    """Return the variant of a part's .safetensors files, "" for plain names, and those names."""
    names = [file.name for file in folder.glob("*.safetensors")]
    kinds = ["".join(name.split(".")[1:-1]).partition("-")[0] for name in names]
    kind = min(kinds, default="")  # "" comes first
    return kind, [name for name, each in zip(names, kinds, strict=True) if each == kind]


def variant(path: str, revision: str, parts: Iterable[str]) -> str | None:
    """Return the variant to ask a pipeline's loader for. Raises ValueError if there are several."""
    root = Path(path)
    if not root.is_dir():
        cached = try_to_load_from_cache(path, "model_index.json", revision=revision)
        root = Path(cached if isinstance(cached, str) else "/").parent
    found = {weights(root / part)[0] for part in parts} - {""}
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
            raise ValueError(f"{path} is no file, folder or hub id ({error}).") from None
    if not found.exists():
        raise ValueError(f"{path}: there is no such file or folder.")
    named = [found / name for name in LORA_FILES if (found / name).is_file()]
    files = named[:1] or ([found] if found.is_file() else sorted(found.glob("*.safetensors")))
    files = list(filter(Path.is_file, files))  # no pipe, which would be waited for
    if len(files) != 1 or files[0].suffix != ".safetensors":
        raise ValueError(
            f"{path}: it has {[file.name for file in files] or 'no .safetensors file'}. One is "
            f"needed, of a LoRA in diffusers' or PEFT's format, such as "
            f"checkpoints/checkpoint-<step>/lora of a run. A .bin or .pt file is a pickle and not "
            f"read: save it as .safetensors first."
        )
    return files[0]
