"""A run's folder is its own: the lock, names without collisions, folders that can't be written."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest

from config.base import base
from flow_grpo.launch import preflight
from flow_grpo.parallel.engine import Ranks
from flow_grpo.parallel.faults.watch import Watch
from flow_grpo.training import claim
from flow_grpo.training.claim import FILE, Claim

ROOT = Path(__file__).parent.parent
HOLDER = """
import sys
from pathlib import Path
from flow_grpo.training import claim
lock = claim._locked(Path(sys.argv[1]))
print("held" if lock else "refused", flush=True)
sys.stdin.read()
"""


class Alone:
    """The only rank."""

    is_main = True
    on_main = Ranks.on_main
    watch = Watch(0, 1)

    def broadcast_object(self, value):
        return value


@pytest.fixture
def config(tmp_path):
    config = base(None)
    config.logdir = str(tmp_path / "logs")
    return config


@pytest.fixture
def holder(tmp_path):
    """Another process that has a run's folder."""
    started = []

    def hold(folder: Path) -> subprocess.Popen:
        folder.mkdir(parents=True, exist_ok=True)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, "-c", HOLDER, folder], cwd=ROOT, **pipes)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", ["x", "sweep/lr1", "with blanks"])
@pytest.mark.parametrize("resume_from", ["", "latest", "auto"])
def test_a_folder_in_use_is_refused_with_host_and_pid_and_free_once_that_process_died(
    config, holder, name, resume_from, monkeypatch
):
    monkeypatch.setattr(claim, "PAUSE_S", 0)
    config.run_name, config.resume_from = name, resume_from
    process = holder(Path(config.logdir) / name)
    for refused in (
        lambda: Claim(config, "c", Alone()),
        lambda: preflight._check_folder(config, ""),
    ):
        with pytest.raises(ValueError) as error:
            refused()
        message = str(error.value)
        assert f"pid {process.pid})" in message and f"host {os.uname().nodename}," in message
        assert f"config.run_name={name!r}" in message and f"`kill {process.pid}`" in message
    process.kill()
    process.wait()
    mine = Claim(config, "c", Alone())
    assert f"pid {os.getpid()}" in (mine.folder / FILE).read_text()
    mine.release()
    assert not (mine.folder / FILE).exists()


def _name(logdir: str, held) -> None:
    config = base(None)
    config.logdir = logdir
    folder = Claim(config, "config", Alone())
    held.put(folder.folder.name)
    held.close()
    held.join_thread()
    os._exit(0)


@pytest.mark.slow
def test_runs_without_a_name_that_start_together_have_folders_of_their_own(config, monkeypatch):
    context = get_context("spawn")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    held = context.Queue()
    processes = [context.Process(target=_name, args=(config.logdir, held)) for _ in range(2)]
    for process in processes:
        process.start()
    names = {held.get(timeout=600) for _ in processes}
    for process in processes:
        process.join()
    monkeypatch.setattr(claim.time, "strftime", lambda _: "now")
    mine = [Claim(config, "config", Alone()) for _ in range(3)]
    names |= {each.folder.name for each in mine}
    assert len(names) == 5 and {"config-now", "config-now-2", "config-now-3"} < names


def test_a_run_that_wrote_nothing_leaves_no_folder(config):
    for name in ("x", "a/b", ""):
        config.run_name = name
        Claim(config, "c", Alone()).release()
        assert not Path(config.logdir).exists()
    config.run_name = "a/b"
    mine = Claim(config, "c", Alone())
    (mine.folder / "metrics.jsonl").touch()
    mine.release()
    assert os.listdir(mine.folder) == ["metrics.jsonl"]


def test_every_rank_hears_of_a_refusal(config):
    class Second(Alone):
        is_main = False

        def broadcast_object(self, value):
            assert value is None
            return None, ValueError("in use by host h, pid 1")

    with pytest.raises(ValueError, match="host h, pid 1"):
        Claim(config, "c", Second())


BROKEN = {
    "the log folder is a file": lambda logs: logs.touch(),
    "the run is a file": lambda logs: (logs.mkdir(), (logs / "x").touch()),
    "its checkpoints are a file": lambda logs: (
        (logs / "x").mkdir(parents=True),
        (logs / "x" / "checkpoints").touch(),
    ),
    "its metrics are a folder": lambda logs: (logs / "x" / "metrics.jsonl").mkdir(parents=True),
    "a link that leads nowhere": lambda logs: logs.symlink_to(logs.parent / "gone" / "logs"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_cannot_be_written_is_refused_by_its_key(config, case):
    BROKEN[case](Path(config.logdir))
    config.run_name = "x"
    if case.startswith("a link"):
        Path(config.logdir).parent.joinpath("gone").touch()
    with pytest.raises(ValueError) as error:
        Claim(config, "c", Alone())
    assert f"config.logdir={config.logdir!r}" in str(error.value)
    assert "Set --config.logdir to a folder that can" in str(error.value)


@pytest.mark.parametrize("place", ["/proc/runs", "/sys/runs", "/dev/null/runs"])
def test_a_read_only_place_is_refused_by_its_key(config, place):
    config.logdir = place
    with pytest.raises(ValueError, match=f"config.logdir='{place}'"):
        Claim(config, "c", Alone())


def test_what_the_user_may_not_write_to_is_refused(config, monkeypatch):
    config.run_name = "x"
    for name in ("checkpoints", "images", "metrics.jsonl"):
        path = Path(config.logdir) / "x" / name
        path.mkdir(parents=True) if "." not in name else path.touch()
        monkeypatch.setattr(claim.os, "access", lambda each, mode, path=path: each != path)
        with pytest.raises(ValueError, match=f"Permission denied.*{name}"):
            Claim(config, "c", Alone())


def test_where_there_are_no_locks_a_run_says_so(config, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(claim.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(claim.fcntl, "lockf", no_locks)
    config.run_name = "x"
    assert Claim(config, "c", Alone()).folder.is_dir()
    assert "nothing keeps a second run out" in capsys.readouterr().out


def test_a_lock_is_the_main_ranks_and_not_a_childs(config):
    config.run_name = "x"
    mine = Claim(config, "c", Alone())
    child = os.fork()
    if child == 0:  # its copy of the lock is none
        mine._lock.close()
        os._exit(0)
    os.waitpid(child, 0)
    command = [sys.executable, "-c", HOLDER, mine.folder]
    done = subprocess.run(command, cwd=ROOT, input="", capture_output=True, text=True, check=True)
    assert done.stdout == "refused\n"
