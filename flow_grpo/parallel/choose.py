"""Which engine trains: the one that accelerate's launcher was asked for; and whether it came."""

import os

import torch
from accelerate.utils import parse_flag_from_env

from flow_grpo.parallel.deepspeed import DeepSpeed
from flow_grpo.parallel.engine import Engine
from flow_grpo.parallel.fsdp2 import FSDP2
from flow_grpo.parallel.plain import Plain

FOREIGN = ("MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER")  # accelerate's, not ours
CONFIG = "scripts/accelerate_configs/{}.yaml"
MULTI_GPU = CONFIG.format("multi_gpu")
WHOLE = CONFIG.format("deepspeed_zero2")  # shards states and gradients, not the weights


def shards_state() -> bool:
    """Whether each rank is to keep a part of the training state of its own."""
    return _deepspeed() or _fsdp()


def refuse_shards() -> None:
    """Raise ValueError where nothing trains, so that there is no state to shard."""
    if shards_state():
        raise ValueError(
            "an evaluation has nothing for DeepSpeed or FSDP to shard. Launch it with "
            f"--config_file {MULTI_GPU}."
        )


def promised() -> tuple[int, int]:
    """Return how many ranks a launcher says there are, and which this is. Raises ValueError."""
    size, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    if not 0 <= rank < size:
        raise ValueError(
            f"RANK={rank} and WORLD_SIZE={size} in the environment: ranks go from 0 to WORLD_SIZE "
            f"- 1. {_relaunch()}"
        )
    return size, rank


def launcher(num_ranks: int) -> str:
    """Return the words before a script that start it on as many ranks of this kind."""
    if num_ranks == 1 and not shards_state():
        return "python"
    on_cpu = "ACCELERATE_USE_CPU=true " if _on_cpu() else ""
    command = f"{on_cpu}accelerate launch --config_file {_config()}"
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")  # torch elastic's word
    if machines != "1":
        command += f" --num_machines {machines} --machine_rank {os.environ.get('GROUP_RANK', 0)}"
        command += f" --main_process_ip {os.environ.get('MASTER_ADDR')}"
        command += f" --main_process_port {os.environ.get('MASTER_PORT', 29500)}"
    return f"{command} --num_processes {num_ranks}"


def start(mixed_precision: str, compiles: bool = False) -> Engine:
    """Meet the other ranks, with nothing to train yet. mixed_precision: no | bf16 | fp16.

    compiles: blocks will be compiled. Raises ValueError where an engine can't, or where this is not
    what the launcher promised.
    """
    size, rank = promised()
    for name in FOREIGN:
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise ValueError(
                f"ACCELERATE_USE_{name} is set: that is not supported yet. {_relaunch()}"
            )
    if _deepspeed() and _on_cpu():
        raise ValueError("DeepSpeed was asked for, and ACCELERATE_USE_CPU too: unset the latter.")
    if compiles and _deepspeed() and _stage() == 3:
        raise ValueError(
            "config.compile=True: DeepSpeed ZeRO-3 gathers by layers, and so can't be compiled. "
            f"Set it to False, or launch with --config_file {CONFIG.format('fsdp2')}."
        )
    _check_gpus()
    engine = _kind()(mixed_precision)
    found = engine.ranks
    if (found.num_ranks, found.rank) != (size, rank):
        raise ValueError(
            f"WORLD_SIZE={size} and RANK={rank} were promised, but accelerate made this process "
            f"rank {found.rank} of {found.num_ranks}. {_cause(found.num_ranks)}"
        )
    return engine


def _kind() -> type[Engine]:
    if _fsdp():
        return FSDP2
    if not _deepspeed():
        return Plain
    if _stage() != 3:
        return DeepSpeed
    from flow_grpo.parallel.zero3 import Zero3  # which needs DeepSpeed itself

    return Zero3


def _config() -> str:
    """Return the file that launches this kind."""
    if _fsdp():
        return CONFIG.format("fsdp2")
    if not _deepspeed():
        return MULTI_GPU
    offloads = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") != "none"
    return CONFIG.format(f"deepspeed_zero{_stage()}{'_offload' if offloads else ''}")


def _deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def _fsdp() -> bool:
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def _stage() -> int:
    return _number("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2)


def _on_cpu() -> bool:
    return parse_flag_from_env("ACCELERATE_USE_CPU")


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "") or str(default)
    if not text.isascii() or not text.removeprefix("-").isdigit():
        raise ValueError(f"{name}={text!r} in the environment: a number is needed. {_relaunch()}")
    return int(text)


def _check_gpus() -> None:
    """Raise ValueError where ranks of this machine would have to share a GPU."""
    local = _number("LOCAL_RANK", -1)
    if local < 0 or _on_cpu() or not torch.cuda.is_available():
        return
    needed, visible = max(_number("LOCAL_WORLD_SIZE", 1), local + 1), torch.cuda.device_count()
    if visible < needed:
        raise ValueError(
            f"{needed} ranks on this machine (LOCAL_WORLD_SIZE, LOCAL_RANK) and {visible} visible "
            f"GPU(s) (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r}): each rank "
            f"needs one of its own. Launch with --num_processes {visible}, or show it more GPUs."
        )


def _cause(num_ranks: int) -> str:
    if num_ranks > 1:
        return _relaunch()
    if _number("LOCAL_RANK", -1) < 0:
        return f"If WORLD_SIZE is left over from something else, unset it. {_relaunch()}"
    return (
        f"torch {torch.__version__} sees {torch.cuda.device_count()} GPU(s) "
        f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r}). To train on the CPU "
        f"put ACCELERATE_USE_CPU=true before the command; otherwise let it see a GPU a rank."
    )


def _relaunch() -> str:
    return f"Launch with: accelerate launch --config_file {MULTI_GPU} --num_processes N SCRIPT ..."
