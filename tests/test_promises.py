"""What a launcher promised and what accelerate made of it: ranks that believe to be alone."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from flow_grpo.parallel import choose

ZERO2 = "scripts/accelerate_configs/deepspeed_zero2.yaml"
ZERO3_OFFLOAD = "scripts/accelerate_configs/deepspeed_zero3_offload.yaml"
WORLD = (
    *("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"),
    *("ACCELERATE_DEEPSPEED_ZERO_STAGE", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"),
    *(
        "ACCELERATE_USE_FSDP",
        "ACCELERATE_USE_CPU",
        "ACCELERATE_USE_DEEPSPEED",
        "CUDA_VISIBLE_DEVICES",
    ),
)


@pytest.fixture
def world(monkeypatch):
    """Set what a launcher would; what accelerate makes of it is (num_ranks, rank)."""
    for name in WORLD:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)

    def set_up(environment: dict[str, str], made=(1, 0), gpus=0):
        engine = SimpleNamespace(ranks=SimpleNamespace(num_ranks=made[0], rank=made[1]))
        for name in ("Plain", "DeepSpeed", "FSDP2"):
            monkeypatch.setattr(choose, name, lambda precision, patience_s: engine)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
        return engine

    return set_up


def ranks(size: int, rank: int, **more: str) -> dict[str, str]:
    local = {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    return {"WORLD_SIZE": str(size), "RANK": str(rank)} | local | more


KEPT = [
    ({}, (1, 0), 0),
    (ranks(1, 0), (1, 0), 1),
    (ranks(2, 1, ACCELERATE_USE_CPU="true"), (2, 1), 0),
    (ranks(2, 1, ACCELERATE_USE_CPU="true"), (2, 1), 1),
    (ranks(8, 7), (8, 7), 8),
    (ranks(2, 0, ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_USE_CPU="False"), (2, 0), 0),
    (ranks(2, 0, ACCELERATE_USE_FSDP="true", ACCELERATE_USE_CPU="true"), (2, 0), 0),
]


@pytest.mark.parametrize("environment, made, gpus", KEPT)
def test_a_promise_that_was_kept_starts_the_engine(world, environment, made, gpus):
    engine = world(environment, made, gpus)
    assert choose.start("no") is engine


BROKEN = {
    "no GPU": (ranks(8, 3), (1, 0), 0, ["WORLD_SIZE=8 and RANK=3", "put ACCELERATE_USE_CPU=true"]),
    "hidden GPUs": (ranks(2, 0, CUDA_VISIBLE_DEVICES=""), (1, 0), 0, ["CUDA_VISIBLE_DEVICES=''"]),
    "left over": ({"WORLD_SIZE": "4"}, (1, 0), 0, ["WORLD_SIZE=4", "left over", "unset it"]),
    "left over, GPU": ({"WORLD_SIZE": "4", "RANK": "0"}, (1, 0), 1, ["left over"]),
    "nobody promised": (
        {"ACCELERATE_USE_CPU": "1"},
        (3, 1),
        0,
        ["rank 1 of 3", "accelerate launch"],
    ),
    "another rank": (ranks(2, 1, ACCELERATE_USE_CPU="1"), (2, 0), 0, ["rank 0 of 2"]),
    "fewer GPUs": (ranks(8, 0), (8, 0), 2, ["8 ranks", "2 visible", "--num_processes 2"]),
    "last rank": ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, (2, 1), 1, ["2 ranks"]),
    "GPUs for DeepSpeed": (ranks(4, 1, ACCELERATE_USE_DEEPSPEED="true"), (4, 1), 3, ["4 ranks"]),
    "DeepSpeed on CPU": (
        ranks(2, 0, ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_USE_CPU="true"),
        (2, 0),
        0,
        ["DeepSpeed was asked for, and ACCELERATE_USE_CPU too"],
    ),
    "DeepSpeed, large": (
        ranks(2, 0, ACCELERATE_USE_DEEPSPEED="True", ACCELERATE_USE_CPU="yes"),
        (1, 0),
        0,
        ["DeepSpeed was asked for"],
    ),
    "Megatron": (ranks(1, 0, ACCELERATE_USE_MEGATRON_LM="true"), (1, 0), 1, ["MEGATRON_LM"]),
    "no number": ({"WORLD_SIZE": "all"}, (1, 0), 0, ["WORLD_SIZE='all'", "a number is needed"]),
    "too large a rank": ({"WORLD_SIZE": "2", "RANK": "2"}, (2, 1), 0, ["RANK=2 and WORLD_SIZE=2"]),
    "a stale store": (
        ranks(2, 0, TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_MAX_RESTARTS="1"),
        (2, 0),
        2,
        ["--max_restarts", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "--rdzv_backend c10d"],
    ),
    "no ranks": ({"WORLD_SIZE": "0"}, (1, 0), 0, ["WORLD_SIZE=0"]),
}


def test_compiled_blocks_under_zero_3_are_refused(world):
    world(ranks(1, 0, ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="3"))
    with pytest.raises(ValueError, match="config.compile=True.*False, or.*fsdp2.yaml"):
        choose.start("no", compiles=True)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_promise_is_refused_with_what_was_promised_and_a_remedy(world, case):
    environment, made, gpus, told = BROKEN[case]
    world(environment, made, gpus)
    with pytest.raises(ValueError) as error:
        choose.start("no")
    assert not [part for part in told if part not in str(error.value)], error.value


@pytest.mark.parametrize(
    "environment, size, command",
    [
        ({}, 1, "python"),
        (ranks(2, 0), 2, f"accelerate launch --config_file {choose.MULTI_GPU} --num_processes 2"),
        (
            ranks(2, 0, ACCELERATE_USE_CPU="true"),
            2,
            f"ACCELERATE_USE_CPU=true accelerate launch --config_file {choose.MULTI_GPU} "
            f"--num_processes 2",
        ),
        (
            ranks(1, 0, ACCELERATE_USE_DEEPSPEED="true"),
            1,
            f"accelerate launch --config_file {ZERO2} --num_processes 1",
        ),
        (
            ranks(
                4,
                0,
                ACCELERATE_USE_DEEPSPEED="true",
                ACCELERATE_DEEPSPEED_ZERO_STAGE="3",
                ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE="cpu",
            ),
            4,
            f"accelerate launch --config_file {ZERO3_OFFLOAD} --num_processes 4",
        ),
        (
            ranks(2, 1, ACCELERATE_USE_FSDP="true", ACCELERATE_USE_CPU="true"),
            2,
            "ACCELERATE_USE_CPU=true accelerate launch --config_file "
            "scripts/accelerate_configs/fsdp2.yaml --num_processes 2",
        ),
        (
            ranks(16, 8, GROUP_WORLD_SIZE="2", GROUP_RANK="1", MASTER_ADDR="h", MASTER_PORT="9"),
            16,
            f"accelerate launch --config_file {choose.MULTI_GPU} --num_machines 2 --machine_rank 1 "
            f"--main_process_ip h --main_process_port 9 --num_processes 16",
        ),
    ],
)
def test_a_run_is_started_again_by_a_launcher_of_its_kind(world, environment, size, command):
    world(environment)
    assert choose.launcher(size) == command
    assert os.path.isfile(command.partition("--config_file ")[2].split(" ")[0] or choose.MULTI_GPU)
