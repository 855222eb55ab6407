"""Which engine trains: the one that accelerate's launcher was asked for."""

import os

from flow_grpo.parallel.deepspeed import DeepSpeed
from flow_grpo.parallel.engine import Engine
from flow_grpo.parallel.plain import Plain


def shards_state() -> bool:
    """Whether each rank is to keep a part of the training state of its own."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def refuse_shards() -> None:
    """Raise ValueError where nothing trains, so that there is no state to shard."""
    if shards_state():
        raise ValueError(
            "an evaluation has nothing for DeepSpeed to shard. Launch it with "
            "--config_file scripts/accelerate_configs/multi_gpu.yaml."
        )


def start(mixed_precision: str) -> Engine:
    """Meet the other ranks, with nothing to train yet. mixed_precision: no | bf16 | fp16."""
    return (DeepSpeed if shards_state() else Plain)(mixed_precision)
