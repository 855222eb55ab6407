"""Fixtures of the tests that run scripts: training on a tiny pipeline, those of the data sets."""

import faulthandler
import os
import runpy
import sys
import threading
from pathlib import Path

import pytest


@pytest.fixture(scope="module", autouse=True)
def accelerate_anew():
    """No file of tests meets the precision or the ranks of another one's runs in its process."""
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(True)
        state.GradientState._reset_state()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A tiny SD3 pipeline, a LoRA for it and a data set, for running.arguments()."""
    import running  # loads every model's code, which most tests do without

    return running.make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def fresh_logs(files, tmp_path):
    """Each test has its own logs, under the name that running.arguments() gives."""
    (files / "logs").unlink(missing_ok=True)
    (files / "logs").symlink_to(tmp_path, target_is_directory=True)


@pytest.fixture
def call(monkeypatch):
    """Run a script of dataset/ in this process; a user's mistake is a SystemExit."""

    def run(name: str, *arguments) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(Path(__file__).parents[1] / "dataset" / name), run_name="__main__")

    return run


@pytest.fixture
def patient(monkeypatch):
    """Reward servers may take their time over saying how they are."""
    monkeypatch.setattr("flow_grpo.rewards.remote.health.HEALTH_S", 600.0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Let one process have all tests of a file, whose fixtures it makes once; not the defects'.

    xdist's own groups have no effect under pytest 9.2, which reads no node's `_nodeid`.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if file.endswith("test_mutants.py") else file

    return ByFile(config, log)


def pytest_sessionfinish(session, exitstatus):
    """Say what keeps a session that is over from ending, and end it with its status."""

    def leave():
        faulthandler.dump_traceback(sys.__stderr__)
        os._exit(int(exitstatus))

    ending = threading.Timer(60, leave)  # seconds; once in five runs a thread stayed for good
    ending.daemon = True
    ending.start()
