"""What the GPU kit's parts are asked and what they answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
LOG_CHARACTERS = 3000  # of a failed run, that are kept


class Setting(NamedTuple):
    """Where and how large all parts run."""

    device: str  # cuda | cpu
    gpu: str  # its name, "" if there is none
    epochs: int  # of the testbed's runs
    small: bool
    scratch: Path  # for runs and models

    @property
    def key(self) -> str:
        where = self.gpu if self.device == "cuda" else "CPU"
        return f"{where}, {self.epochs} epochs{', small' * self.small}"

    @property
    def precisions(self) -> tuple[str, ...]:
        return ("fp32", "bf16") if self.device == "cpu" else ("fp16", "bf16", "fp32")


class Row(NamedTuple):
    name: str
    passed: bool
    figures: str
    values: dict[str, float] | None = None
    log: str = ""  # its end, where something failed


class Part(NamedTuple):
    name: str
    rows: Callable[[Setting, set[str]], Iterator[Row]]
    limit_s: float
    devices: tuple[str, ...] = ("cuda", "cpu")
