"""Torch's FSDP2: each rank holds rows of every weight; blocks are gathered one after the other."""

import math
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate.utils import parse_flag_from_env, patch_environment
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from flow_grpo.parallel.plain import PATIENCE_S, Plain
from flow_grpo.parallel.sharded import Sharded
from flow_grpo.parallel.speed import repeated_blocks


class FSDP2(Sharded, Plain):
    """What trains and what does not are cut alike, along the first dimension.

    The optimizer steps plain tensors, one for each weight, which share memory with its rows here.
    Of accelerate only the settings are used, as its launcher passes them on.
    """

    cuts_weights = True

    def __init__(self, mixed_precision: str, patience_s: float = PATIENCE_S):
        """mixed_precision: no | bf16 | fp16. Raises ValueError for FSDP1, or what is not cut."""
        for name, needed in (("FSDP_VERSION", "2"), ("FSDP_RESHARD_AFTER_FORWARD", "true")):
            if (found := os.environ.get(name, needed)).lower() != needed:
                raise ValueError(
                    f"{name}={found}: {needed} is needed in accelerate's config, as "
                    f"scripts/accelerate_configs/fsdp2.yaml has it."
                )
        # With it transformers would leave encoders without their weights on all ranks but one.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        with patch_environment(ACCELERATE_USE_FSDP="false"):
            super().__init__(mixed_precision, patience_s)
        if not distributed.is_initialized():
            distributed.init_process_group(
                "gloo", store=distributed.HashStore(), rank=0, world_size=1
            )

    def wrap(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> None:
        self._take(module)
        self._max_grad_norm = max_grad_norm or math.inf
        names = {param: name for name, param in self._trained.items()}
        # Which lets it autocast, and no more.
        self.model = self._accelerator.prepare_model(module, False, evaluation_mode=True)
        settings = self._settings(module)
        for part in (*repeated_blocks(module), module):
            fully_shard(part, **settings)
        now = dict(module.named_parameters())
        self._trained = {name: now[name] for name in self._shapes}
        self._rows = {name: nn.Parameter(master) for name, master in self.masters().items()}
        for group in optimizer.param_groups:
            group["params"] = [
                self._rows[names[param]] for param in group["params"] if names[param] in self._rows
            ]
        self.optimizer = optimizer

    def _settings(self, module: nn.Module) -> dict:
        """Return what fully_shard() is told. Where all weights are fp32, they are cast once."""
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
            self._accelerator.mixed_precision
        )
        mixed = any(param.dtype != torch.float32 for param in module.parameters())
        pinned = torch.cuda.is_available()
        offload = parse_flag_from_env("FSDP_OFFLOAD_PARAMS")
        return {
            "mesh": init_device_mesh(self.ranks.device.type, (self.ranks.num_ranks,)),
            "reshard_after_forward": True,  # the root too: what stays whole would not follow put()
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=None if mixed else half,
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,
            ),
            "offload_policy": CPUOffloadPolicy(pinned) if offload else OffloadPolicy(),
        }

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()  # each pass's gradients are cut at once: whole ones need more memory

    def norm(self) -> Tensor:
        for name, row in self._rows.items():
            row.data, gradient = self._master(name), self._trained[name].grad
            row.grad = None if gradient is None else gradient.to_local().flatten()
        own = super().norm().to(self.ranks.device)
        return self.ranks.total(own.double() ** 2).sqrt()

    def step(self, norm: float) -> None:
        super().step(norm)
        self.model.zero_grad()

    def discard(self, overflow: bool) -> None:
        """A rank alone may have seen the overflow; all lower the scale."""
        lower = overflow and self.looks_for_scale
        factor = self.scaler.get_backoff_factor() if lower else 1.0
        self.scaler.update(self.scaler.get_scale() * factor)
        self.optimizer.zero_grad()
        self.model.zero_grad()

    def whole(self) -> dict[str, Tensor]:
        found = self.module.state_dict()
        for name, value in found.items():
            if isinstance(value, DTensor):
                gathered = value.to(self.ranks.device).full_tensor()
                found[name] = gathered.to("cpu") if self.ranks.is_main else gathered[:0]
        return found

    def _held(self, name: str) -> tuple[int, int]:
        shape = self._shapes[name]
        piece = math.ceil(shape[0] / self.ranks.num_ranks)
        start, stop = (min(n * piece, shape[0]) for n in (self.ranks.rank, self.ranks.rank + 1))
        return start * shape[1:].numel(), stop * shape[1:].numel()

    def _lies(self, name: str) -> tuple[str, int]:
        return name, 0

    def _master(self, name: str) -> Tensor:
        return self._trained[name].detach().to_local().view(-1)

    def _stepped(self) -> dict[str, Tensor]:
        return self._rows
