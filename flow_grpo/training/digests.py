"""Digests of a checkpoint's files: one that was damaged or exchanged is found before it is used."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

SEAL = "sha256 of the rest"  # of trainer.json, in itself


def of(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of files below a folder, by their relative names."""
    return {str(path.relative_to(folder)): _sha256(path) for path in files}


def sealed(state: dict) -> dict:
    """Add the digest of all else that a JSON object says."""
    return state | {SEAL: _seal(state)}


def check_seal(state: dict) -> None:
    """Raise ValueError unless the digest that sealed() added is that of all else."""
    if state.get(SEAL) != _seal({key: value for key, value in state.items() if key != SEAL}):
        raise ValueError("its digest is another one")


def problem(folder: Path, files: dict[str, str]) -> str:
    """Say which of these files is not as it was written, "" if none. files: what of() returned."""
    for name, digest in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _sha256(folder / name) != digest:
            return f"{name} is not as it was written: it was damaged, or is of another checkpoint"
    return ""


def _seal(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
