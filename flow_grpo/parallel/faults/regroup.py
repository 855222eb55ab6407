"""Meet again after an error that not all ranks have: within a time, and told whose it was."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, distributed_c10d

from flow_grpo.parallel.faults.watch import Watch

MEETING = timedelta(minutes=1)  # a rank may be drawing images until it waits for the others
PAUSE_S = 0.05


def regroup(
    watch: Watch, cause: str, given_up: Callable[[], bool], patience: timedelta
) -> tuple[int, str, str]:
    """Leave the group and make one of all ranks anew, over CPUs; every rank that can must call it.

    To leave it closes this rank's connections, which under gloo wakes who waits for it with an
    error. Whom nothing wakes, as under NCCL, ends by its own watch. cause: this rank's error.
    Returns rank and cause of the first one, and why not all have met, within `patience`, or until
    given_up() or one is gone; "" if they have.
    """
    rank, num_ranks = watch.rank, watch.num_ranks
    first, words, apart = rank, cause, ""
    store = watch.post(cause)
    if store is None:
        return first, words, "the store of the ranks is gone"
    try:
        if distributed_c10d.get_backend() == "nccl":
            distributed_c10d._abort_process_group()
        else:
            distributed_c10d.destroy_process_group()
        deadline = time.monotonic() + patience.total_seconds()
        while missing := watch.fine(store):
            if given_up() or watch.gone(missing) or time.monotonic() > deadline:
                break
            time.sleep(PAUSE_S)
        first, words = watch.first(store)
        if missing:
            apart = f"{watch.others(missing)} did not meet the others"
        else:
            distributed_c10d.init_process_group(
                "gloo",
                store=PrefixStore("after an error", store),
                rank=rank,
                world_size=num_ranks,
                timeout=patience,
            )
    except (RuntimeError, ValueError) as error:
        apart = f"not all ranks have met ({error})"
    return first, words, apart
