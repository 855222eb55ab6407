"""Fixtures of the tests that run a training script on a tiny pipeline."""

from pathlib import Path

import pytest


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
