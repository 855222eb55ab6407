"""A training's state on disk, of every engine: safetensors and JSON, so that none can execute.

weights-<part>: policy/<weight>, <snapshot>/<weight>. optimizer-<part>: <stepped tensor>/<moment>.
"""

import json
from pathlib import Path

import torch
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


def not_finite(weights: dict[str, Tensor], moments: Moments) -> list[str]:
    """Name the weights and moments that hold a NaN or an infinity."""
    flat = {f"{name}/{key}": v for name, values in moments.items() for key, v in values.items()}
    tensors = {name: v for name, v in (weights | flat).items() if isinstance(v, Tensor)}
    return [name for name, value in tensors.items() if not value.isfinite().all()]


def check(
    folder: Path,
    weights: dict[str, Tensor],
    moments: Moments,
    masters: dict[str, Tensor],
    stepped: dict[str, torch.Size],
    policy: str,
) -> None:
    """Raise ValueError unless what was read has the names and shapes of what trains, and is finite.

    masters: the policy's weights now; its names follow `policy`, a snapshot's its own prefix.
    stepped: the shapes of what the optimizer steps; moments of 8 bits have others.
    """
    needed = {f"{policy}{name}" for name in masters}
    wrong = [f"{name} is missing" for name in sorted(needed - weights.keys())]
    for name, value in weights.items():
        _, of_weight, own = name.partition("/")
        if of_weight and (own not in masters or masters[own].shape != value.shape):
            wrong.append(f"{name} has the shape {tuple(value.shape)}, or belongs to no weight")
    wrong += [f"{name} has no moments" for name in stepped.keys() - moments.keys()]
    for name in stepped.keys() & moments.keys():
        for key in ("exp_avg", "exp_avg_sq"):
            if key in moments[name] and moments[name][key].shape != stepped[name]:
                wrong.append(f"{name}/{key} has the shape {tuple(moments[name][key].shape)}")
    wrong += [f"{name} is not finite" for name in not_finite(weights, moments)]
    if wrong:
        raise ValueError(
            f"{str(folder)!r} does not hold the state of this run's weights: {wrong[0]}, and "
            f"{len(wrong) - 1} more. Resume from another checkpoint."
        )


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
