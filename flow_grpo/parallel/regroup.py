"""Meet again after an error that not all ranks have: within a time, and told whose it was."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, distributed_c10d

MEETING = timedelta(minutes=1)  # a rank may be drawing images until it waits for the others
PAUSE_S = 0.05


def regroup(
    rank: int, num_ranks: int, cause: str, given_up: Callable[[], bool], patience: timedelta
) -> tuple[int, str, str]:
    """Leave the group and make one of all ranks anew, over CPUs; every rank that can must call it.

    To leave it closes this rank's connections, which under gloo wakes who waits for it with an
    error. NCCL wakes none: there it is left to the launcher to end the others. cause: this rank's
    error. Returns rank and cause of the first one, and why not all have met, within `patience` or
    until given_up(); "" if they have.
    """
    # Who hosts it outlives the group: the launcher, or the main rank.
    store = PrefixStore("after an error", distributed_c10d._get_default_store())
    first, words, apart = rank, cause, ""
    try:
        store.set(str(rank), json.dumps([store.add("number", 1), rank, cause]))
        if distributed_c10d.get_backend() == "nccl":
            distributed_c10d._abort_process_group()
        else:
            distributed_c10d.destroy_process_group()
        deadline = time.monotonic() + patience.total_seconds()
        while missing := [n for n in range(num_ranks) if not store.check([str(n)])]:
            if given_up() or time.monotonic() > deadline:
                break
            time.sleep(PAUSE_S)
        there = [n for n in range(num_ranks) if n not in missing]
        _, first, words = min(json.loads(store.get(str(n))) for n in there)
        if missing:
            apart = f"rank {', '.join(map(str, missing))} did not meet the others"
        else:
            distributed_c10d.init_process_group(
                "gloo", store=store, rank=rank, world_size=num_ranks, timeout=patience
            )
    except (RuntimeError, ValueError) as error:
        apart = f"not all ranks have met ({error})"
    return first, words, apart
