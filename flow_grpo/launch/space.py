"""Whether a checkpoint fits on the disk, as far as files tell before a weight is loaded."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from ml_collections import ConfigDict

from flow_grpo.diffusers_patch.disk import files
from flow_grpo.launch.encoders import DTYPES
from flow_grpo.objectives.registry import anywhere, copies
from flow_grpo.training import folders


def check(
    config: ConfigDict,
    targets: tuple[str, ...],
    folder: Path,
    resumed: Path | None,
    trained_part: str = "",
) -> None:
    """Raise ValueError where a run's folder has no room for a checkpoint.

    targets: the modules that a new LoRA is of, by the ends of their names. trained_part: of the
    names of what a full fine-tune trains.
    """
    if resumed:
        needed = sum((resumed / name).stat().st_size for name in folders.read(resumed)["files"])
    else:
        kept = 4 + len(copies(anywhere(config), config))
        needed = 4 * _num_trained(config, targets, trained_part) * kept
        if trained_part and not config.use_lora:  # the export has what does not train, too
            rest = (shape for name, shape in _shapes(config).items() if trained_part not in name)
            needed += DTYPES[config.mixed_precision].itemsize * sum(map(math.prod, rest))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"config.logdir={config.logdir!r}: a checkpoint takes about {needed / 2**20:,.0f} MiB, "
            f"and {free / 2**20:,.0f} MiB are free there. Make room, or set --config.logdir to a "
            f"folder on a larger disk."
        )


def _num_trained(config: ConfigDict, targets: tuple[str, ...], trained_part: str) -> int:
    """Count what will train; at least 1, where the model's files are not here or tell nothing.

    A checkpoint has it in fp32: weights, two moments, and once more as diffusers loads it.
    """
    if config.use_lora and config.train.lora_path:
        found = shapes_of(Path(config.train.lora_path))
        return max(1, sum(map(math.prod, found.values())))
    shapes = _shapes(config)
    if not config.use_lora:
        return max(1, sum(math.prod(v) for name, v in shapes.items() if trained_part in name))
    ends = tuple(f".{target}.weight" for target in config.train.lora_targets or targets)
    chosen = [shape for name, shape in shapes.items() if f".{name}".endswith(ends)]
    return max(1, config.train.lora_rank * sum(sum(shape[:2]) for shape in chosen))


def _shapes(config: ConfigDict) -> dict[str, list[int]]:
    model = Path(config.pretrained.model)
    return shapes_of(model / "transformer") or shapes_of(model)


def shapes_of(path: Path) -> dict[str, list[int]]:
    """Read the shapes of a file's tensors, or of a folder's files."""
    shapes = {}
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        try:
            told = files.header(file)
        except (OSError, ValueError):
            continue  # loading it will tell what is wrong
        shapes |= {name: each["shape"] for name, each in told.items() if "shape" in each}
    return shapes
