"""Ranks that wait for each other by the store: all come, one fails, one hangs, one is gone."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import torch
from forking import ON_CPU, on_ranks
from ml_collections import ConfigDict
from torch import distributed
from waiting import wait_until

from config.base import base
from flow_grpo.launch import build
from flow_grpo.parallel import choose
from flow_grpo.parallel.faults import watch

SHORT_S = 0.05


def start(**constants: float) -> watch.Watch:
    """Begin to watch, where other times count than those of a run."""
    for name, value in ({"BEAT_S": 0.01} | constants).items():
        setattr(watch, name, value)
    ranks = choose.start("no").ranks
    ranks.watch.begin(in_layers=False)
    return ranks.watch


def told(act) -> str:
    """Return what a call raises."""
    try:
        act()
    except RuntimeError as error:
        return str(error)
    return ""


def until_all_have_begun(mine: watch.Watch) -> None:
    wait_until(lambda: len(mine._seen) == mine.num_ranks)


def has_patience(folder: Path, config: ConfigDict) -> None:
    build._start(config)
    group = distributed.distributed_c10d._get_default_group()
    waits = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    (folder / os.environ["RANK"]).write_text(str(waits))


def test_a_collective_waits_as_long_as_it_is_told(tmp_path):
    config = base()
    config.mixed_precision, config.collective_timeout = "no", 17.0
    on_ranks(2, ON_CPU, has_patience, tmp_path, config)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["17.0", "17.0"]


def meets(folder: Path) -> None:
    mine = start()
    for number in range(5):
        late = number % mine.num_ranks
        if mine.rank == late:
            (folder / str(number)).touch()
        mine.meet()
        assert (folder / str(number)).exists()
    mine.end()


def test_no_rank_goes_on_before_all_have_met(tmp_path):
    on_ranks(3, ON_CPU, meets, tmp_path)


def fails(folder: Path) -> None:
    mine = start()
    if mine.rank == 1:
        mine.post("OSError: no luck")
    else:
        said = told(mine.meet)
        assert said == "rank 1 failed: OSError: no luck"
        assert told(lambda: choose_gather(mine)) == said  # nothing is asked of it any more
        store = mine.post("a second one")
        assert mine.first(store) == (1, "OSError: no luck") and mine.fine(store) == []
        mine.check()  # who ends as well is not ended


def choose_gather(mine: watch.Watch) -> None:
    from flow_grpo.parallel.engine import Ranks

    ranks = Ranks(torch.device("cpu"))
    ranks.watch = mine
    ranks.gather(torch.zeros(1))


def test_a_failure_is_told_to_those_who_wait(tmp_path):
    on_ranks(2, ON_CPU, fails, tmp_path)


def hangs(folder: Path) -> None:
    mine = start()
    if mine.rank == 1:
        mine.phase = "reward of epoch 3"
        wait_until((folder / "found").exists)
    else:
        until_all_have_begun(mine)
        wait_until(lambda: mine._seen[1][0][1].startswith("reward"))
        said = told(lambda: mine.meet(SHORT_S))
        (folder / "found").write_text(said)
        assert re.match(r"waited \d+ s for rank 1 \(in reward of epoch 3 for", said)


def test_a_rank_that_hangs_is_named_with_its_phase(tmp_path):
    on_ranks(2, ON_CPU, hangs, tmp_path)


def waits_in_a_collective(folder: Path) -> None:
    mine = start(GRACE_S=SHORT_S)
    until_all_have_begun(mine)
    if mine.rank == 1:
        mine.post("OSError: no luck")
        wait_until(lambda: mine.gone([0]))
        os._exit(0)
    mine.phase = "update of epoch 2"
    os.dup2(os.open(folder / "said", os.O_CREAT | os.O_WRONLY), 2)
    distributed.all_reduce(torch.zeros(1))  # which nobody else calls


def test_a_rank_that_nothing_wakes_ends_with_the_reason_and_where_it_waited(tmp_path):
    on_ranks(2, ON_CPU, waits_in_a_collective, tmp_path, statuses=[1, 0])
    said = (tmp_path / "said").read_text()
    assert "rank 0 ends: rank 1 failed: OSError: no luck. This rank was in update of epo" in said
    assert "distributed.all_reduce(torch.zeros(1))" in said


def until_all_are_in_update(mine: watch.Watch) -> None:
    """Where silence counts sooner than while a model loads; and let the others see it."""
    mine.phase, looks = "update", mine._looks
    wait_until(lambda: mine._looks > looks + 1)
    wait_until(lambda: [sign[1] for sign, _ in mine._seen.values()] == ["update"] * 2)


def loads(folder: Path) -> None:
    mine = start()
    until_all_have_begun(mine)
    watch.SILENCE_S = -1.0
    assert not mine.gone([0, 1])  # all are in their start, until all have seen it
    (folder / str(mine.rank)).touch()
    wait_until(lambda: len(list(folder.iterdir())) == mine.num_ranks)
    until_all_are_in_update(mine)
    assert mine.gone([1 - mine.rank])
    mine.end()


def test_silence_counts_later_while_a_model_loads(tmp_path):
    on_ranks(2, ON_CPU, loads, tmp_path)


def is_stopped(folder: Path) -> None:
    is_main = os.environ["RANK"] == "0"
    mine = start(**{"SILENCE_S": 1.0, "QUIET_S": SHORT_S} if is_main else {})
    until_all_are_in_update(mine)
    if not is_main:
        os.kill(os.getpid(), signal.SIGSTOP)
    os.dup2(os.open(folder / "said", os.O_CREAT | os.O_WRONLY), 2)
    distributed.all_reduce(torch.zeros(1))


def test_a_rank_without_a_sign_of_life_is_given_up_and_killed_on_ones_own_machine(tmp_path):
    here = ON_CPU | {"GROUP_RANK": "0"}
    on_ranks(2, here, is_stopped, tmp_path, statuses=[1, -signal.SIGKILL])
    said = (tmp_path / "said").read_text()
    assert "rank 0 ends: no sign of rank 1 (in update for" in said and "silent for" in said


def ends(folder: Path) -> None:
    mine = start()
    until_all_are_in_update(mine)
    if mine.rank == 1:
        mine.end()
    else:
        wait_until(lambda: mine._ended(1))
        looks, watch.SILENCE_S = mine._looks, 0.0
        wait_until(lambda: mine._looks > looks + 3)
        assert mine.failure == ""


def test_a_rank_that_has_ended_is_not_missed(tmp_path):
    on_ranks(2, ON_CPU, ends, tmp_path)


def loses_its_store(folder: Path) -> None:
    """The store is the main rank's here, as where no launcher keeps it."""
    mine = start(QUIET_S=SHORT_S)
    until_all_have_begun(mine)
    distributed.barrier()
    if mine.rank == 0:
        os._exit(9)
    os.dup2(os.open(folder / "said", os.O_CREAT | os.O_WRONLY), 2)
    wait_until(lambda: False)


def test_a_rank_whose_store_is_gone_ends_with_the_reason(tmp_path):
    free = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = free.port
    del free
    own = {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    on_ranks(2, ON_CPU | own, loses_its_store, tmp_path, statuses=[9, 1])
    assert "rank 1 ends: the store of the ranks is gone" in (tmp_path / "said").read_text()
