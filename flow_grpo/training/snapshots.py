"""Copies of the trained weights: the average that is evaluated, the old policy, the reference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Snapshots:
    """Named fp32 copies of a module's trainable parameters, and a way to run the module with one.

    A LoRA's reference is the module without its adapter, so no copy is held for it.
    """

    def __init__(self, module: nn.Module, names: Iterable[str], use_lora: bool):
        self._module = module
        self._params = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._without_adapter = use_lora
        self._held: dict[str, dict[str, Tensor]] = {}
        self._in_use = False
        for name in names:
            if name != "reference" or not use_lora:
                self._held[name] = {n: _master(p).clone() for n, p in self._params.items()}

    @torch.no_grad()
    def update(self, name: str, decay: float) -> None:
        """Set copy `name` to decay x copy + (1 - decay) x policy. Every rank must call it."""
        for key, param in self._params.items():
            self._held[name][key].lerp_(_master(param), 1 - decay)

    def values(self, name: str) -> dict[str, Tensor]:
        """Return the fp32 weights of `name` ("policy": its own). Every rank must call it."""
        if name in self._held:
            return self._held[name]
        return {key: _master(param) for key, param in self._params.items()}

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Run the module with the weights of `name` ("policy": its own). Not to be nested."""
        assert not self._in_use, "a snapshot is in use already"
        self._in_use = name != "policy"
        try:
            yield from self._swapped(name)
        finally:
            self._in_use = False

    def _swapped(self, name: str) -> Iterator[None]:
        if name == "policy":
            yield
        elif name == "reference" and name not in self._held:
            self._module.disable_adapters()
            try:
                yield
            finally:
                self._module.enable_adapters()  # which also lets all of them train
                for key, param in self._module.named_parameters():
                    param.requires_grad_(key in self._params)
        else:
            own = {key: param.detach().clone() for key, param in self._params.items()}
            self._write(self._held[name])
            try:
                yield
            finally:
                self._write(own)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for key, param in self._params.items():
            param.copy_(values[key])

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{n}/{key}": t for n, copy in self._held.items() for key, t in copy.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, held in self._held.items():
            for key, tensor in held.items():
                tensor.copy_(state[f"{name}/{key}"])


def ema_decay(decay: float, num_updates: int) -> float:
    """Return the average's decay after so many optimizer steps: at first it forgets its start."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


def _master(param: nn.Parameter) -> Tensor:
    """Return the fp32 value that the optimizer holds; DeepSpeed keeps it apart, in shards."""
    if hasattr(param, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(param).to(param.device)
    return param.detach().float()
