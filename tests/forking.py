"""Processes that start fast: forked from one that has loaded the libraries and none of our code."""

import os
from multiprocessing import get_context

from waiting import HANG_S

LIBRARIES = [
    "accelerate",
    "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "peft",
    "pytest",
]
FORKED = get_context("forkserver")
FORKED.set_forkserver_preload(LIBRARIES)

ON_CPU = {"ACCELERATE_USE_CPU": "true"}


FSDP = ON_CPU | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def zero(stage: int) -> dict[str, str]:
    """Return what accelerate's launcher tells its processes if they are to use DeepSpeed."""
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}


def on_ranks(
    num_ranks: int, environment: dict[str, str], function, *arguments, statuses=None
) -> None:
    """Call function(*arguments) on so many ranks; fails if it does on any. 1: without a group.

    statuses: with which the ranks' processes must end, if not with 0.
    """
    from torch.distributed import TCPStore  # mutants.py does without

    # Where the ranks meet is here, on a port that no other test can have meanwhile.
    meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {"WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": meeting.port}
    world |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    ranks = [
        FORKED.Process(
            target=_as_rank,
            args=(world | {"RANK": rank, "LOCAL_RANK": rank}, environment, function, arguments),
            daemon=True,
        )
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(HANG_S)
    assert [process.exitcode for process in ranks] == (statuses or [0] * num_ranks)


def _as_rank(world: dict, environment: dict[str, str], function, arguments: tuple) -> None:
    if world["WORLD_SIZE"] > 1:
        os.environ |= {key: str(value) for key, value in world.items()}
    os.environ |= environment
    function(*arguments)
    if world["WORLD_SIZE"] > 1:
        from torch import distributed

        distributed.barrier()
        os._exit(0)  # the interpreter's own way out aborts in threads of the group, now and then
