"""A training's state on disk, of every engine: safetensors and JSON, so that none can execute.

    weights-<part>.safetensors      policy/<weight>, and <snapshot>/<weight> for each snapshot
    optimizer-<part>.safetensors    <tensor that the optimizer steps>/<moment>
    index.json                      {"scale": .., "parts": [{"layout": .., "moments": ..}, ..]}

Engines whose ranks hold the same write one part, others one for each rank.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

INDEX = "index.json"
Moments = dict[str, dict[str, "Tensor | float | None"]]  # by stepped tensor and key


@dataclass
class State:
    """What a rank holds of a training."""

    layout: dict[str, dict]  # of each trained weight its shape, and [start, stop) of what is held
    weights: dict[str, Tensor]  # of the policy and the snapshots, each a part as in the layout
    moments: Moments
    scale: dict[str, float]  # fp16's search for its loss scale


def write(folder: Path, part: int, state: State) -> dict:
    """Write one part's tensors and return what the index says of it."""
    tensors, moments = {}, {}
    for name, values in state.moments.items():
        moments[name] = {key: _described(value) for key, value in values.items()}
        tensors |= {f"{name}/{k}": v for k, v in values.items() if isinstance(v, Tensor)}
    save_file(_on_host(state.weights), _weights(folder, part))
    save_file(_on_host(tensors), _optimizer(folder, part))
    return {"layout": state.layout, "moments": moments}


def write_index(folder: Path, parts: list[dict], scale: dict[str, float]) -> None:
    """Write index.json. parts: of write(), one or one for each rank."""
    (folder / INDEX).write_text(json.dumps({"scale": scale, "parts": parts}) + "\n")


def read(folder: Path, part: int, num_parts: int, layout: dict[str, dict]) -> State:
    """Read one of num_parts parts, onto the CPU.

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
    tensors = load_file(_optimizer(folder, part))
    moments = {
        name: {
            key: tensors[f"{name}/{key}"] if isinstance(value, list) else value
            for key, value in values.items()
        }
        for name, values in parts[part]["moments"].items()
    }
    return State(layout, load_file(_weights(folder, part)), moments, index["scale"])


def _described(value: Tensor | float | None) -> list[int] | float | None:
    """Return a tensor's shape, or the number itself."""
    if isinstance(value, Tensor):
        return list(value.shape)
    assert value is None or isinstance(value, (int, float)), f"a moment of {type(value)}"
    return value


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy, as safetensors refuses tensors that share memory."""
    return {
        name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()
    }


def _weights(folder: Path, part: int) -> Path:
    return folder / f"weights-{part}.safetensors"


def _optimizer(folder: Path, part: int) -> Path:
    return folder / f"optimizer-{part}.safetensors"
