"""Faster passes through the transformer; those compiled compute in sampling what training does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils._pytree import tree_map

MOST_GRAPHS = 64  # of a kind of block: one for each shape, precision and adapter


def leave_casts_to_autocast(transformer: nn.Module) -> None:
    """Let no adapter cast its input to fp32, which autocast undoes; without one all are fp32."""
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False


@contextmanager
def merged(transformer: nn.Module) -> Iterator[None]:
    """Run with the active adapter added to its weights, rounded to their precision.

    They are put back to the bit, of which a subtraction would fall short; for so long there is one
    more copy of those that the adapter is of.
    """
    found = (layer for layer in transformer.modules() if isinstance(layer, LoraLayer))
    layers = [layer for layer in found if not layer.disable_adapters]
    own = [layer.get_base_layer().weight.data for layer in layers]
    try:
        for layer in layers:
            weight, names = layer.get_base_layer().weight, layer.active_adapters
            for name in names:
                weight.data = (weight.data + layer.get_delta_weight(name)).to(weight.dtype)
            layer.merged_adapters.extend(names)  # from now on peft's layer adds nothing
        yield
    finally:
        for layer, data in zip(layers, own, strict=True):
            layer.get_base_layer().weight.data = data
            layer.merged_adapters.clear()


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the blocks of its lists; those of what is in it, where it has none itself."""
    lists = [each for each in module.children() if isinstance(each, nn.ModuleList)]
    if not lists:
        return [block for each in module.children() for block in repeated_blocks(each)]
    return [block for each in lists for block in each]


def compile_blocks(transformer: nn.Module) -> int:
    """Compile the blocks that the transformer repeats, and return how many; call it before wrap().

    A graph that a backward pass may follow rounds otherwise than one without. So each block always
    runs the first kind: where no gradient is wanted it runs with gradients, which end at its
    output. Inputs count as if they had gradients, else a first block had a graph of its own.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    blocks = repeated_blocks(transformer)
    inside = {param for block in blocks for param in block.parameters()}
    others = (param for param in transformer.parameters() if param not in inside)
    # (B, T, D) are the tokens; time (B, D) has a gradient only where its embedding trains.
    least_ndim = 0 if any(param.requires_grad for param in others) else 3
    for block in blocks:
        block.forward = _one_graph(torch.compile(block.forward, dynamic=False), least_ndim)
    return len(blocks)


def _one_graph(forward: Callable, least_ndim: int) -> Callable:
    """Call a compiled forward with gradients on; least_ndim: of inputs that count as having one."""

    def with_gradient(value: Any) -> Any:
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        if not is_float or value.ndim < least_ndim or value.requires_grad:
            return value
        return value.detach().requires_grad_()

    def run(*args: Any, **kwargs: Any) -> Any:
        wanted = torch.is_grad_enabled()
        with torch.enable_grad():
            args, kwargs = tree_map(with_gradient, (args, kwargs))
            output = forward(*args, **kwargs)
        return output if wanted else tree_map(_detached, output)

    return run


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value
