"""One process, or several with a whole copy of everything each (DDP)."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs as DDPKwargs
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flow_grpo.parallel.engine import Engine, Parts

PATIENCE_S = 300.0  # for a collective: config.collective_timeout


class Plain(Engine):
    """All ranks hold the same weights and moments; gradients are summed in the last backward."""

    def __init__(self, mixed_precision: str, patience_s: float = PATIENCE_S, cpu: bool = False):
        """mixed_precision: no | bf16 | fp16. cpu: use no GPU even if there is one."""
        group = InitProcessGroupKwargs(timeout=timedelta(seconds=patience_s))
        kwargs = [DDPKwargs(broadcast_buffers=False), group]
        super().__init__(
            Accelerator(cpu=cpu, mixed_precision=mixed_precision, kwargs_handlers=kwargs)
        )
        # Not in fp16: one that does nothing.
        self.scaler = self._accelerator.scaler or torch.amp.GradScaler(enabled=False)

    @property
    def looks_for_scale(self) -> bool:
        return self.scaler.is_enabled()

    def wrap(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> None:
        self.module, self.optimizer = module, optimizer
        self.model = self._accelerator.prepare_model(module)
        self._max_grad_norm = max_grad_norm or math.inf
        self._trained = {n: p for n, p in module.named_parameters() if p.requires_grad}

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        if last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def backward(self, loss: Tensor) -> None:
        loss = loss * self.ranks.num_ranks  # DDP averages
        self.scaler.scale(loss).backward()

    def norm(self) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self._stepped().values() if p.grad is not None]
        return nn.utils.get_total_norm(gradients)

    def step(self, norm: float) -> None:
        params = list(self._stepped().values())
        dtype = params[0].dtype if params else None  # a rank may hold none
        whole = torch.full((), norm, dtype=dtype, device=self.ranks.device)
        nn.utils.clip_grads_with_norm_(params, self._max_grad_norm, whole)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def discard(self, overflow: bool) -> None:
        # The scaler remembers what norm() unscaled until it is updated.
        self.scaler.update(None if overflow else self.scaler.get_scale())
        self.optimizer.zero_grad()

    def masters(self) -> Parts:
        return {
            name: param.detach().to(torch.promote_types(param.dtype, torch.float32))
            for name, param in self._trained.items()
        }

    @torch.no_grad()
    def put(self, parts: Parts) -> None:
        for name, param in self._trained.items():
            param.copy_(parts[name])

    def full(self, parts: Parts) -> Iterator[tuple[str, Tensor]]:
        yield from parts.items()

    def _let_go(self) -> None:
        if isinstance(self.model, DistributedDataParallel):  # which no public call ends
            vars(self.model).update(reducer=None, logger=None, process_group=None)

    def _layout(self) -> dict[str, dict]:
        return {
            name: {
                "shape": list(param.shape),
                "held": [0, param.numel()],
                "row": False,
                "in": [name, 0],
            }
            for name, param in self._trained.items()
        }

    def _stepped(self) -> dict[str, Tensor]:
        return self._trained

    def _scale(self) -> dict[str, float]:
        return self.scaler.state_dict()  # {} if it does nothing

    def _set_scale(self, scale: dict[str, float]) -> None:
        if scale:
            self.scaler.load_state_dict(scale)
