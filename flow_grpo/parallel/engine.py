"""What training asks of an engine, and what all ranks do together."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import operations
from safetensors import SafetensorError
from torch import Tensor, distributed, nn

from flow_grpo.parallel import state
from flow_grpo.parallel.faults import regroup
from flow_grpo.parallel.faults.watch import Watch

POLICY = "policy"  # before a weight's name and /, where snapshots' weights stand beside it
Parts = dict[str, Tensor]  # by a trained weight's name: what this rank holds of a value of it


class Ranks:
    """The processes of a run. All must make the same calls, in the same order."""

    def __init__(self, device: torch.device):
        self.device, state = device, PartialState()
        self.rank, self.num_ranks = state.process_index, state.num_processes
        self.watch = Watch(self.rank, self.num_ranks)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, values: Tensor) -> Tensor:
        """Join all ranks' values (N, ...), of one shape, to (num_ranks x N, ...) by rank."""
        self.watch.check()
        return operations.gather(torch.atleast_1d(values))

    def total(self, values: Tensor) -> Tensor:
        """Add up all ranks' values, of one shape."""
        self.watch.check()
        return operations.reduce(values, "sum")

    def gather_objects(self, value: Any) -> list:
        self.watch.check()
        return operations.gather_object([value])

    def broadcast_object(self, value: Any) -> Any:
        self.watch.check()
        return operations.broadcast_object_list([value])[0]

    def on_all(self, act: Callable[[], Any]) -> list:
        """Let every rank act; return by rank what came of it, or raise one's OSError on all."""
        outcome = _tried(act)
        self.watch.meet()  # which may take long: not in a collective
        outcomes = self.gather_objects(outcome)
        if failed := [error for _, error in outcomes if error]:
            raise failed[0]
        return [value for value, _ in outcomes]

    def on_main(self, act: Callable[[], Any]) -> Any:
        """Let the main rank act; return on all what came of it, or raise its error: see _tried."""
        outcome = _tried(act) if self.is_main else None
        self.watch.meet()
        value, error = self.broadcast_object(outcome)
        if error:
            raise error
        return value

    def barrier(self) -> None:
        self.watch.meet()
        if self.num_ranks > 1:
            on_gpu = distributed.get_backend() == "nccl"
            distributed.barrier(device_ids=[self.device.index] if on_gpu else None)


def _tried(act: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Return what came of it, and its error where a user or the system is at fault."""
    try:
        return act(), None
    except (ValueError, OSError) as error:
        return None, error
    except SafetensorError as error:  # its own name for one of the system
        return None, OSError(str(error))


class Engine(ABC):
    """One way to train a module on all ranks, which must make the same calls, in this order.

    No engine steps inside a backward pass: gradients are judged in between.
    """

    module: nn.Module  # what trains
    model: nn.Module  # the same, wrapped: what sampling and training call
    optimizer: torch.optim.Optimizer  # of the weights, or of this rank's part of them
    num_parts: int = 1  # of a state: 1, or one for each rank
    cuts_weights: bool = False  # those of the module too: it can't be given adapters any more
    looks_for_scale: bool = False  # fp16: an overflow is no fault, it lowers the loss scale

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self.ranks = Ranks(accelerator.device)

    @abstractmethod
    def wrap(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> None:
        """Take what trains. max_grad_norm: step() clips to it; 0: it does not."""

    def wrap_frozen(self, module: nn.Module) -> nn.Module:
        """Return a module that only predicts, as training's would."""
        return self._accelerator.prepare_model(module, evaluation_mode=True)

    @abstractmethod
    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Wrap a forward and backward pass. last: of the update, where gradients meet."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of the loss; ranks are summed, not averaged."""

    @abstractmethod
    def norm(self) -> Tensor:
        """Measure the unclipped gradient, (), on the device; not finite where an element is not."""

    @abstractmethod
    def step(self, norm: float) -> None:
        """Clip, step and forget the gradient. norm: what norm() measured, which is finite."""

    @abstractmethod
    def discard(self, overflow: bool) -> None:
        """Forget the gradient after norm(). overflow: the loss was finite; fp16's scale falls."""

    @abstractmethod
    def masters(self) -> Parts:
        """Return the weights as the optimizer holds them, fp32 or finer. Not to be written to."""

    @abstractmethod
    def put(self, parts: Parts) -> None:
        """Set the masters, and the module's weights after them."""

    @abstractmethod
    def full(self, parts: Parts) -> Iterator[tuple[str, Tensor]]:
        """Give each weight's name and whole value in turn. parts: masters(), or a snapshot's."""

    def whole(self) -> dict[str, Tensor]:
        """Return the module's state, what does not train as well; on the main rank at least."""
        return self.module.state_dict()

    def save(self, folder: Path, further: Parts) -> list[Path]:
        """Write masters, moments and loss scale, and `further` parts of weights by any names.

        Returns the files that this rank wrote. Raises on all ranks FloatingPointError, and writes
        nothing, if a value is not finite; OSError if one could not write.
        """
        masters, moments, scale = self.get_state()
        weights = {f"{POLICY}/{name}": part for name, part in masters.items()} | further
        broken = sum(self.ranks.gather_objects(state.not_finite(weights, moments)), [])
        if broken:
            raise FloatingPointError(
                f"{broken[0]} is not finite, and {len(broken) - 1} more: nothing is saved. Resume "
                f"from the last checkpoint with a lower config.train.learning_rate."
            )
        part, files = self.ranks.rank, []

        def write() -> dict | None:
            if part < self.num_parts:
                files.extend(folder / n.format(part) for n in (state.WEIGHTS, state.OPTIMIZER))
                return state.write(folder, part, self._layout(), weights, moments)

        index = {"scale": scale, "parts": self.ranks.on_all(write)[: self.num_parts]}
        text = json.dumps(index) + "\n"
        self.ranks.on_main(lambda: (folder / state.INDEX).write_text(text))
        return files

    def load(self, folder: Path, copies: Iterable[str] = ()) -> Parts:
        """Continue from what save() wrote; return `further`. Raises ValueError, all as it was.

        However many ranks wrote it, and with whichever engine, each takes what it is to hold.
        copies: the names before / of what must be in `further`, each with all weights.
        """
        part = self.ranks.rank % self.num_parts
        masters, stepped, own = self.masters(), self._stepped(), self._scale()
        weights, moments, scale = state.read(
            folder, part, self.num_parts, self._layout(), masters, stepped
        )
        is_adam = isinstance(self.optimizer, torch.optim.AdamW)
        state.check(folder, weights, moments, masters, stepped, (POLICY, *copies), is_adam)
        if scale and own and scale.keys() != own.keys():
            raise ValueError(
                f"{folder / state.INDEX} holds the loss scale of another engine's fp16 "
                f"({', '.join(sorted(scale))}). Resume with the engine that wrote it, or with "
                f"config.mixed_precision=bf16."
            )
        masters = {name: weights.pop(f"{POLICY}/{name}") for name in masters}
        self.set_state(masters, moments, scale if own else {})  # another precision's
        return weights

    def get_state(self) -> tuple[Parts, state.Moments, dict[str, float]]:
        """Return masters, moments and fp16's search for its loss scale. Not to be written to."""
        stepped = self._stepped().items()
        moments = {name: dict(self.optimizer.state.get(tensor, {})) for name, tensor in stepped}
        return self.masters(), moments, self._scale()

    def set_state(self, masters: Parts, moments: state.Moments, scale: dict[str, float]) -> None:
        """Go back to what get_state() returned."""
        self.put(masters)
        for name, tensor in self._stepped().items():
            self.optimizer.state[tensor] = {
                key: value.to(tensor.device) if isinstance(value, Tensor) else value
                for key, value in moments[name].items()
            }
        self._set_scale(scale)

    @abstractmethod
    def _layout(self) -> dict[str, dict]:
        """Return of each trained weight what state.Layout says; masters() has what is held."""

    @abstractmethod
    def _stepped(self) -> dict[str, Tensor]:
        """Name the tensors that the optimizer steps."""

    @abstractmethod
    def _scale(self) -> dict[str, float]:
        """Return the state of fp16's search for its loss scale; {} in other precisions."""

    @abstractmethod
    def _set_scale(self, scale: dict[str, float]) -> None:
        """Continue the search."""

    def regroup(self, error: Exception, given_up: Callable[[], bool]) -> tuple[int, str, str]:
        """Meet all ranks after an error, never to train again; see regroup.py, for what it gives.

        Where not all have met, no rank may ask anything of the others any more.
        """
        words, ranks = f"{type(error).__name__}: {error}", self.ranks
        if ranks.num_ranks == 1:
            return 0, words, ""
        self._let_go()
        return regroup.regroup(ranks.watch, words, given_up, regroup.MEETING)

    def _let_go(self) -> None:
        """Hold no group of ranks any more, so that its connections can close, if that is known."""
        return

    def leave(self) -> None:
        """Need the other ranks no more, and be missed by none."""
        self.ranks.watch.end()
        self._accelerator.end_training()
