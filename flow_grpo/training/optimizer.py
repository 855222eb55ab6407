"""Gradient accumulation, clipping and the optimizer step, the same under DDP and DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import ml_collections
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn


def build(params: list[nn.Parameter], train: ml_collections.ConfigDict) -> torch.optim.Optimizer:
    """Return AdamW over the trained parameters, in 8 bits if asked for."""
    settings = dict(
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        weight_decay=train.adam_weight_decay,
        eps=train.adam_epsilon,
    )
    if train.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(params, **settings)
    return torch.optim.AdamW(params, **settings, fused=True)


def learning_rate(train: ml_collections.ConfigDict, num_updates: int, total_updates: int) -> float:
    """Return the rate of the next update: warm-up, then constant, linear or cosine."""
    warm = min(1.0, (num_updates + 1) / (train.lr_warmup_steps + 1))
    left = max(total_updates - train.lr_warmup_steps, 1)
    done = min(max(num_updates - train.lr_warmup_steps, 0) / left, 1.0)
    shape = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
    }
    return train.learning_rate * warm * shape[train.lr_scheduler]


class Updater:
    """Makes and counts the optimizer steps; the accumulation boundary is set here alone."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        train: ml_collections.ConfigDict,
        total_updates: int,
    ):
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.train, self.total_updates = train, total_updates
        self.params = [param for param in model.parameters() if param.requires_grad]
        self.num_updates = 0
        self.num_skipped_in_a_row = 0
        self.num_skipped = 0

    @property
    def uses_deepspeed(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Wrap a forward and backward pass; gradients meet across ranks at the last one only."""
        self.accelerator.gradient_state._set_sync_gradients(last)
        if last:
            self._set_learning_rate()
            yield
        else:
            with self.accelerator.no_sync(self.model):
                yield

    def all_finite(self, value: Tensor) -> bool:
        """Whether `value` is finite on every rank. Waits for the device, before the backward."""
        bad = self.accelerator.reduce((~torch.isfinite(value)).any().float(), "sum")
        return bad.item() == 0

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of the loss; ranks are summed, not averaged."""
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def step(self) -> float | None:
        """Clip, step and reset the gradients. Returns the gradient's norm; None: skipped."""
        in_fp16 = self.accelerator.mixed_precision == "fp16"  # it still looks for its scale
        if self.uses_deepspeed:  # its engine clipped and stepped inside the last backward
            norm = float(self.model.get_global_grad_norm() or 0.0)
            if not math.isfinite(norm):
                return self.skip(count=not in_fp16)
        else:
            limit = self.train.max_grad_norm or math.inf
            norm = self.accelerator.clip_grad_norm_(self.params, limit).item()
            if math.isfinite(norm) or in_fp16:
                self.optimizer.step()  # in fp16 the scaler leaves a step out and lowers its scale
            if not math.isfinite(norm):
                return self.skip(count=not in_fp16)
            self.optimizer.zero_grad()
        self.num_updates += 1
        self.num_skipped_in_a_row = 0
        return norm

    def skip(self, count: bool = True) -> None:
        """Give up this update: nothing of it may reach the next one.

        Raises FloatingPointError after train.max_nonfinite_updates in a row that count.
        """
        self.accelerator.gradient_state._set_sync_gradients(True)  # or zero_grad() does nothing
        self.optimizer.zero_grad()
        if self.uses_deepspeed:
            # Nor here, and no call of DeepSpeed's forgets what earlier backward passes summed up.
            sharded = self.model.optimizer
            sharded.zero_grad()
            for name in ("averaged_gradients", "all_grad_tensors"):
                sums = getattr(sharded, name, {})
                sums.update(dict.fromkeys(sums))
        self.num_skipped += 1
        self.num_skipped_in_a_row += count
        if self.num_skipped_in_a_row >= self.train.max_nonfinite_updates:
            raise FloatingPointError(
                f"{self.num_skipped_in_a_row} updates in a row had a non-finite loss or gradient. "
                f"Lower config.train.learning_rate, or use config.mixed_precision=bf16 or no."
            )

    def load_optimizer(self, state: dict) -> None:
        """Restore the moments; the settings (betas, weight decay ...) stay the config's."""
        settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state)
        for group, chosen in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(chosen)

    def _set_learning_rate(self) -> None:
        rate = learning_rate(self.train, self.num_updates, self.total_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
