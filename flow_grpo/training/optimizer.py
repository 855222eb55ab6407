"""The optimizer, its learning rate, and which of its steps are taken."""

import math

import ml_collections
import torch
from torch import nn

from flow_grpo.parallel.engine import Engine


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
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return train.learning_rate * warm * shape[train.lr_scheduler]


class Updater:
    """Takes or skips an engine's optimizer steps, sets their rate and counts them."""

    def __init__(self, engine: Engine, train: ml_collections.ConfigDict, total_updates: int):
        self.engine, self.train, self.total_updates = engine, train, total_updates
        self.rate = 0.0  # of the last step
        self.num_updates = 0
        self.num_skipped_in_a_row = 0
        self.num_skipped = 0

    def finish(self, loss: float, norm: float) -> bool:
        """Step, or skip the update if its loss or gradient, of all ranks, is not finite.

        Returns whether it stepped. Raises FloatingPointError after too many skips in a row.
        """
        overflow = math.isfinite(loss) and not math.isfinite(norm)
        if overflow or not math.isfinite(loss):
            self.engine.discard(overflow)
            self.num_skipped += 1
            self.num_skipped_in_a_row += not (overflow and self.engine.looks_for_scale)
            if self.num_skipped_in_a_row >= self.train.max_nonfinite_updates:
                raise FloatingPointError(
                    f"{self.num_skipped_in_a_row} updates in a row had a non-finite loss or "
                    f"gradient. Lower config.train.learning_rate, or use "
                    f"config.mixed_precision=bf16 or no."
                )
            return False
        self.rate = learning_rate(self.train, self.num_updates, self.total_updates)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.rate
        self.engine.step(norm)
        self.num_updates += 1
        self.num_skipped_in_a_row = 0
        return True
