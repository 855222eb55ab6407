"""Heads of rewards on an encoder: linear layers one after another, nothing between them."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def read(path: str) -> dict[str, Tensor]:
    """Read a file of tensors, .safetensors or a .pth or .pt without code in it."""
    if path.endswith(".safetensors"):
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def build(weights: dict[str, Tensor], source: str) -> nn.Sequential:
    """Build the layers from "layers.<n>.weight" and ".bias", in order of n; fp32, frozen.

    What lies between them in training is dropout, which a trained head does not use.
    Raises ValueError, naming the source, if there are none.
    """
    numbers = sorted({int(key.split(".")[1]) for key in weights if key.startswith("layers.")})
    if not numbers:
        raise ValueError(f"{source!r} has no layers.<n>.weight: it is not the head that is needed.")
    head = nn.Sequential()
    for number in numbers:
        weight, bias = weights[f"layers.{number}.weight"], weights[f"layers.{number}.bias"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        head.append(layer)
    return head.eval().requires_grad_(False)
