"""Copies of the trained weights: the average that is evaluated, the old policy, the reference."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy

import torch
from peft.functional import inject_adapter_in_model, set_adapter
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn, zeros_like

from flow_grpo.parallel.engine import Engine, Parts
from flow_grpo.records import on_host
from flow_grpo.training.optimizer import Updater

POLICY = "default"  # the adapter that trains, as peft and diffusers call it


class Snapshots:
    """Named copies of the engine's masters, and a way to run the module with one.

    Under LoRA each is also an adapter, written when the copy moves; a full fine-tune swaps weights,
    and so does an engine that cuts them. A LoRA's reference is no adapter, until it is moved.
    waits: what is no adapter is on the host. All ranks must make each call.
    """

    def __init__(self, engine: Engine, names: Iterable[str], use_lora: bool, waits: bool = False):
        self._engine, self._use_lora = engine, use_lora
        self._by_adapter = use_lora and not engine.cuts_weights
        self._waits = waits and not self._by_adapter
        self._held: dict[str, Parts] = {}
        self._adapters: dict[str, dict[str, nn.Parameter]] = {}  # by the policy's weights' names
        self._in_use = False
        for name in names:
            if name != "reference" or not use_lora:
                self._hold(name, {n: self._kept(m) for n, m in engine.masters().items()})

    @property
    def names(self) -> list[str]:
        return list(self._held)

    @torch.no_grad()
    def update(self, name: str, decay: float) -> None:
        """Set copy `name` to decay x copy + (1 - decay) x policy."""
        masters = self._engine.masters()
        if name == "reference" and name not in self._held:  # B = 0: it starts as no adapter
            start = {n: m if ".lora_A." in n else zeros_like(m) for n, m in masters.items()}
            self._hold(name, {n: self._kept(value) for n, value in start.items()})
        for key, master in masters.items():
            held = self._held[name][key]
            moved = held.to(master.device).lerp_(master, 1 - decay)
            if moved is not held:
                held.copy_(moved)
        self._show(name)

    def values(self, name: str) -> dict[str, Tensor]:
        """Return the whole weights of `name` ("policy": its own), until its next move."""
        masters = self._engine.masters()
        parts = masters if name == "policy" else self._held[name]
        return dict(self._engine.full({n: v.to(masters[n].device) for n, v in parts.items()}))

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Run with the weights of `name`; not nested, nor between a forward and its backward."""
        assert not self._in_use, "a snapshot is in use already"
        self._in_use = name != "policy"
        if name == "policy":
            way = nullcontext()
        elif self._use_lora and name == "reference" and name not in self._held:
            way = no_adapter(self._engine.module)
        else:
            assert name in self._held, f"no snapshot {name!r}"
            adapted = self._by_adapter
            way = _other_adapter(self._engine.module, name) if adapted else self._swapped(name)
        try:
            with way:
                yield
        finally:
            self._in_use = False

    @contextmanager
    def _swapped(self, name: str) -> Iterator[None]:
        own = {key: self._kept(master) for key, master in self._engine.masters().items()}
        self._engine.put(self._held[name])
        try:
            yield
        finally:
            self._engine.put(own)

    def state_dict(self) -> Parts:
        return {f"{n}/{key}": t for n, copy in self._held.items() for key, t in copy.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Parts) -> None:
        """Continue from a state_dict(). Raises KeyError if it lacks a copy."""
        masters = self._engine.masters()
        if any(key.startswith("reference/") for key in state) and "reference" not in self._held:
            self._hold("reference", {n: self._kept(master) for n, master in masters.items()})
        for name, held in self._held.items():
            for key, tensor in held.items():
                tensor.copy_(state[f"{name}/{key}"])
            self._show(name)

    def _kept(self, value: Tensor) -> Tensor:
        return on_host(value) if self._waits else value.clone()

    def _hold(self, name: str, weights: Parts) -> None:
        self._held[name] = weights
        if self._by_adapter:
            blank = name == "reference"
            self._adapters[name] = params = _add_adapter(self._engine.module, name, blank)
            for key, value in weights.items():
                if (params[key].shape, params[key].dtype) == (value.shape, value.dtype):
                    params[key].data = value  # whole and as fine: once is enough
            self._show(name)

    @torch.no_grad()
    def _show(self, name: str) -> None:
        if self._by_adapter:
            for key, value in self._engine.full(self._held[name]):
                self._adapters[name][key].copy_(value)


@contextmanager
def no_adapter(module: nn.Module) -> Iterator[None]:
    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    with _same_weights_train(module):
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)


@contextmanager
def _other_adapter(module: nn.Module, name: str) -> Iterator[None]:
    with _same_weights_train(module):
        set_adapter(module, name, inference_mode=True)
        try:
            yield
        finally:
            set_adapter(module, POLICY)


def _add_adapter(module: nn.Module, name: str, blank: bool) -> dict[str, nn.Parameter]:
    """Add an adapter that equals the policy's, or does nothing; return its weights."""
    with _same_weights_train(module), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft: "This will lead to having multiple adapters"
        inject_adapter_in_model(deepcopy(module.peft_config[POLICY]), module, name)
        set_adapter(module, POLICY)
    params, added = dict(module.named_parameters()), {}
    for key, param in params.items():
        head, found, tail = key.rpartition(f".{POLICY}")
        if found and "lora_" in head:
            added[key] = params[f"{head}.{name}{tail}"]
            blanked = blank and "lora_B" in head
            added[key].data = zeros_like(param) if blanked else param.detach().clone()
    return added


@contextmanager
def _same_weights_train(module: nn.Module) -> Iterator[None]:
    """Undo that peft lets an adapter train that it switches on, and no other one."""
    trained = {id(param) for param in module.parameters() if param.requires_grad}
    try:
        yield
    finally:
        for param in module.parameters():
            param.requires_grad_(id(param) in trained)


def ema_decay(decay: float, num_updates: int) -> float:
    """Return the average's decay after so many optimizer steps: at first it forgets its start."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


class Held:
    """What an epoch's updates change, as it was before the first one, on the host."""

    def __init__(self, engine: Engine, snapshots: Snapshots, updater: Updater):
        self._engine, self._snapshots, self._updater = engine, snapshots, updater
        masters, moments, self._scale = engine.get_state()
        self._masters, self._copies = _copies(masters), _copies(snapshots.state_dict())
        self._moments = {name: _copies(values) for name, values in moments.items()}
        self._updates, self._skipped = updater.num_updates, updater.num_skipped
        self._in_a_row = updater.num_skipped_in_a_row

    def restore(self) -> None:
        self._engine.set_state(self._masters, self._moments, self._scale)
        self._snapshots.load_state_dict(self._copies)
        self._updater.num_updates, self._updater.num_skipped = self._updates, self._skipped
        self._updater.num_skipped_in_a_row = self._in_a_row


def _copies(values: dict) -> dict:
    return {
        name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        for name, value in values.items()
    }
