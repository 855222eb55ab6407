"""A training's state on disk, of every engine: safetensors and JSON, so that none can execute.

weights-<part>: policy/<weight>, <snapshot>/<weight>. optimizer-<part>: <stepped tensor>/<moment>.
"""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flow_grpo.parallel import recut

INDEX, WEIGHTS, OPTIMIZER = "index.json", "weights-{}.safetensors", "optimizer-{}.safetensors"
# Of each trained weight its shape, [start, stop) of what is held, whether as one row, and in which
# stepped tensor that lies and from which element on; None if nothing is held.
Layout = dict[str, dict]
Moments = dict[str, dict[str, "Tensor | float | None"]]  # by stepped tensor and key
ADAM = {"step", "exp_avg", "exp_avg_sq"}  # moments as torch keeps them
REMEDY = "Resume from another checkpoint."


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
    comparable = {n: v.float() if v.itemsize == 1 else v for n, v in tensors.items()}
    return [name for name, value in comparable.items() if not value.isfinite().all()]


def check(
    folder: Path,
    weights: dict[str, Tensor],
    moments: Moments,
    masters: dict[str, Tensor],
    stepped: dict[str, Tensor],
    copies: Iterable[str],
    is_adam: bool,
) -> None:
    """Raise ValueError unless what was read can be this run's: names, shapes, types and values.

    masters: the policy's weights now. stepped: what the optimizer steps, and whether it is torch's
    Adam. copies: the prefixes of weights that must be there; of another one all must be.
    """
    of_weights = {name for name in weights if "/" in name}  # not what else a caller keeps there
    prefixes = {*copies, *(name.partition("/")[0] for name in of_weights)}
    needed = {f"{copy}/{name}": each for copy in prefixes for name, each in masters.items()}
    wrong = [f"{name} is missing" for name in sorted(needed.keys() - weights.keys())]
    wrong += [f"{name} belongs to no weight" for name in sorted(of_weights - needed.keys())]
    likes = [(name, value, needed.get(name, value)) for name, value in weights.items()]
    wrong += [f"{name} has no moments" for name in stepped.keys() - moments.keys()]
    for name, given in moments.items():
        kinds = {key for key, value in given.items() if isinstance(value, Tensor)}
        if name not in stepped or is_adam and given and not given.keys() == kinds == ADAM:
            wrong.append(f"{name} has the moments {sorted(given)}")
        elif is_adam and given:
            like = dict.fromkeys(ADAM, stepped[name]) | {"step": torch.zeros(())}
            likes += [(f"{name}/{key}", given[key], like[key]) for key in sorted(ADAM)]
    for name, value, like in likes:
        if (value.shape, value.dtype) != (like.shape, like.dtype):
            wrong.append(f"{name} has the shape {list(value.shape)} and the type {value.dtype}")
        elif name.endswith(("/step", "/exp_avg_sq")) and (value < 0).any():
            wrong.append(f"{name} is negative")
    wrong += [f"{name} is not finite" for name in not_finite(weights, moments)]
    if wrong:
        raise ValueError(
            f"{str(folder)!r} does not hold the state of this run's weights: {wrong[0]}, and "
            f"{len(wrong) - 1} more. {REMEDY}"
        )


def read(
    folder: Path,
    part: int,
    num_parts: int,
    layout: Layout,
    masters: dict[str, Tensor],
    stepped: dict[str, Tensor],
) -> tuple[dict[str, Tensor], Moments, dict[str, float]]:
    """Read one of num_parts parts, onto the CPU: weights, moments and fp16's search for its scale.

    layout, masters, stepped: this rank's. What was written in other parts is cut anew. Raises
    ValueError if it is of other weights, or has moments that can't be cut.
    """
    parts, scale = _read(folder / INDEX, _index)
    shapes = {name: where["shape"] for name, where in layout.items()}
    if any({n: where.get("shape") for n, where in p["layout"].items()} != shapes for p in parts):
        raise ValueError(
            f"{str(folder)!r} holds the state of {len(parts[0]['layout'])} weights in {len(parts)} "
            f"part(s); this run trains {len(layout)}, or others. Resume with the weights that it "
            f"was written with."
        )
    if len(parts) == num_parts and parts[part]["layout"] == layout:
        return *_own(folder, part, parts[part]["moments"]), scale
    if odd := {key for p in parts for values in p["moments"].values() for key in values} - ADAM:
        raise ValueError(
            f"{str(folder)!r} was written in {len(parts)} part(s), this run has {num_parts}, or "
            f"cuts them otherwise; and only AdamW's moments of 32 bits can be cut anew, not "
            f"{', '.join(sorted(odd))}. Resume with as many ranks, and the engine, that wrote it."
        )
    return *_read(folder, lambda _: _others(folder, parts, layout, masters, stepped)), scale


def _others(
    folder: Path,
    parts: list[dict],
    layout: Layout,
    masters: dict[str, Tensor],
    stepped: dict[str, Tensor],
) -> tuple[dict[str, Tensor], Moments]:
    """Read from all parts what this rank is to hold."""
    of_weights, of_optimizer = (
        [safe_open(folder / file.format(number), "pt") for number in range(len(parts))]
        for file in (WEIGHTS, OPTIMIZER)
    )
    weights = recut.weights(of_weights, parts, layout, masters)
    return weights, recut.moments(of_optimizer, parts, layout, stepped)


def _own(folder: Path, part: int, described: dict) -> tuple[dict[str, Tensor], Moments]:
    """Read a part as it was written. described: what the index says of its moments."""
    weights, tensors = (_read(folder / f.format(part), load_file) for f in (WEIGHTS, OPTIMIZER))
    flat = {f"{name}/{key}": v for name, values in described.items() for key, v in values.items()}
    if odd := {name for name, value in flat.items() if isinstance(value, list)} ^ tensors.keys():
        file = folder / OPTIMIZER.format(part)
        raise ValueError(f"{file} does not fit {INDEX}, as {min(odd)} shows. {REMEDY}")
    moments = {
        name: {
            key: tensors[f"{name}/{key}"] if isinstance(value, list) else value
            for key, value in values.items()
        }
        for name, values in described.items()
    }
    return weights, moments


def _read(path: Path, reader: Callable[[Path], Any]) -> Any:
    """Let a reader read; whatever it finds wrong is a ValueError that names the file."""
    try:
        return reader(path)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}). {REMEDY}") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} can't be read ({error}). {REMEDY}") from None


def _index(path: Path) -> tuple[list[dict], dict[str, float]]:
    """Read what there is of each part, and the search for the loss scale."""
    index = json.loads(path.read_text())
    parts, scale = index["parts"], index["scale"]
    for numbers in (scale, *(values for part in parts for values in part["moments"].values())):
        for name, value in numbers.items():
            if not (value is None or isinstance(value, list) or math.isfinite(value)):
                raise ValueError(f"{name} is {value}")
    layouts = [where for part in parts for where in part["layout"].values()]
    if not parts or not all(isinstance(where, dict) for where in layouts):
        raise ValueError("it describes no part")
    return parts, scale
