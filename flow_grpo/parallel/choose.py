"""Which engine trains: the one that accelerate's launcher was asked for."""

from __future__ import annotations

from flow_grpo.parallel.deepspeed import DeepSpeed
from flow_grpo.parallel.engine import Engine
from flow_grpo.parallel.launched import shards_state
from flow_grpo.parallel.plain import Plain


def start(mixed_precision: str) -> Engine:
    """Meet the other ranks and return the engine, which has nothing to train yet.

    mixed_precision: no | bf16 | fp16.
    """
    return (DeepSpeed if shards_state() else Plain)(mixed_precision)
