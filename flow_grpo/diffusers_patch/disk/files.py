"""Which weight files are there, and are they whole. No torch."""

from __future__ import annotations

import json
from pathlib import Path

LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
POINTER = b"version https://git-lfs"


def header(file: Path) -> dict:
    """Return a .safetensors file's header. Raises ValueError if the file is not whole."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(len(POINTER))
        if start == POINTER:
            raise ValueError(f"{file} is a git-lfs pointer, not the file itself. Run: git lfs pull")
        opened.seek(8)
        length = int.from_bytes(start[:8], "little")
        text = opened.read(length) if length < size else b""
    try:
        held = json.loads(text)
        ends = [each["data_offsets"][1] for key, each in held.items() if key != "__metadata__"]
    except ValueError:
        held, ends = {}, [size]
    if size != 8 + length + max(ends, default=0):
        raise ValueError(
            f"{file} is damaged or cut short: of {size:,} bytes, which are not those that its "
            f"header tells of. Download or copy it again."
        )
    return held


def variant(folder: Path) -> str:
    """Return what stands before .safetensors in a part's file names, such as fp16; "" if nothing.

    Raises ValueError if there are several, none of them empty.
    """
    found = {f.name.split(".")[1].split("-")[0] for f in folder.glob("*.safetensors")}
    if len(found) > 1 and "safetensors" not in found:
        raise ValueError(f"{folder} holds weights as {sorted(found)}. Keep the files of one alone.")
    return "" if not found or "safetensors" in found else found.pop()


def lora_file(path: str) -> Path:
    """Return a LoRA's file. path: it, its folder or a hub id. Raises ValueError if it is none."""
    found = Path(path)
    if not found.exists() and not path.startswith((".", "/")) and path.count("/") == 1:
        from huggingface_hub import snapshot_download

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
        raise ValueError(
            f"one .safetensors file is needed, not {[f.name for f in files]}. Name it."
        )
    return files[0]
