"""Whether a checkpoint fits on the disk, as far as files tell before a weight is loaded."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open

from flow_grpo.training import folders


def check(config: ConfigDict, targets: tuple[str, ...], folder: Path, resumed: Path | None) -> None:
    """Raise ValueError where a run's folder has no room for a checkpoint.

    targets: the modules that a new LoRA is of, by the ends of their names.
    """
    if resumed:
        needed = sum((resumed / name).stat().st_size for name in folders.read(resumed)["files"])
    else:
        needed = 4 * _num_trained(config, targets) * (4 + config.train.ema)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"config.logdir={config.logdir!r}: a checkpoint takes about {needed / 2**20:,.0f} MiB, "
            f"and {free / 2**20:,.0f} MiB are free there. Make room, or set --config.logdir to a "
            f"folder on a larger disk."
        )


def _num_trained(config: ConfigDict, targets: tuple[str, ...]) -> int:
    """Count what will train; at least 1, where the model's files are not here or tell nothing.

    A checkpoint has it in fp32: weights, two moments, and once more as diffusers loads it.
    """
    if config.use_lora and config.train.lora_path:
        found = shapes_of(Path(config.train.lora_path))
        return max(1, sum(map(math.prod, found.values())))
    shapes = shapes_of(Path(config.pretrained.model) / "transformer")
    if not config.use_lora:
        return max(1, sum(map(math.prod, shapes.values())))
    ends = tuple(f".{target}.weight" for target in config.train.lora_targets or targets)
    chosen = [shape for name, shape in shapes.items() if f".{name}".endswith(ends)]
    return max(1, config.train.lora_rank * sum(sum(shape[:2]) for shape in chosen))


def shapes_of(path: Path) -> dict[str, list[int]]:
    """Read the shapes of a file's tensors, or of a folder's files."""
    shapes = {}
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
        except (OSError, SafetensorError):
            continue  # loading it will tell what is wrong
    return shapes
