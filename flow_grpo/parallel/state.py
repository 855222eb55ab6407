"""A training's state on disk, of every engine: safetensors and JSON, so that none can execute.

weights-<part>: policy/<weight>, <snapshot>/<weight>. optimizer-<part>: <stepped tensor>/<moment>.
"""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

INDEX, WEIGHTS, OPTIMIZER = "index.json", "weights-{}.safetensors", "optimizer-{}.safetensors"
Layout = dict[str, dict]  # of each trained weight its shape, and [start, stop) of what is held
Moments = dict[str, dict[str, "Tensor | float | None"]]  # by stepped tensor and key


def write(
    folder: Path, part: int, layout: Layout, weights: dict[str, Tensor], moments: Moments
) -> dict:
    """Write one part, with policy's and snapshots' weights; return what the index says of it."""
    flat = {f"{name}/{key}": v for name, values in moments.items() for key, v in values.items()}
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    for file, each in ((WEIGHTS, weights), (OPTIMIZER, tensors)):
        # Copied, as safetensors refuses tensors that share memory.
        copies = {n: v.detach().to("cpu", copy=True).contiguous() for n, v in each.items()}
        save_file(copies, folder / file.format(part))
    described = {
        name: {k: list(v.shape) if isinstance(v, Tensor) else v for k, v in values.items()}
        for name, values in moments.items()
    }
    return {"layout": layout, "moments": described}


def read(
    folder: Path, part: int, num_parts: int, layout: Layout
) -> tuple[dict[str, Tensor], Moments, dict[str, float]]:
    """Read one of num_parts parts, onto the CPU: weights, moments and fp16's search for its scale.

    Raises ValueError unless it is of so many and its layout is the one given.
    """
    index = json.loads((folder / INDEX).read_text())
    parts = index["parts"]
    if len(parts) != num_parts or parts[part]["layout"] != layout:
        raise ValueError(
            f"{str(folder)!r} holds the state of {len(parts[0]['layout'])} weights in {len(parts)} "
            f"part(s); this run trains {len(layout)} in {num_parts}, or others. Resume with as "
            f"many ranks and the weights that it was written with."
        )
    weights, tensors = (load_file(folder / file.format(part)) for file in (WEIGHTS, OPTIMIZER))
    moments = {
        name: {
            key: tensors[f"{name}/{key}"] if isinstance(value, list) else value
            for key, value in values.items()
        }
        for name, values in parts[part]["moments"].items()
    }
    return weights, moments, index["scale"]
