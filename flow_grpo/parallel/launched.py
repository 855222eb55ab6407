"""What the launcher put into the environment. No torch."""

from __future__ import annotations

import os


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
