"""Many updates of every engine on two ranks follow those of one process, whatever trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import running
import same_training
from forking import ON_CPU, on_ranks
from same_training import ENGINES, Cell

CELLS = [  # of the product that same_training.py tries
    Cell("sd3", "grpo", lora=True),
    Cell("sd3", "nft", lora=True, precision="bf16"),
    Cell("sd3", "dpo", lora=False),
    Cell("qwenimage", "grpo", lora=False),
    Cell("qwenimage", "nft", lora=False),
    Cell("qwenimage", "dpo", lora=True),
    Cell("sd3", "trunk", lora=True),  # ranks make unequal calls
]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return same_training.make_files(running.make_files(tmp_path_factory.mktemp("files")))


@pytest.fixture(scope="module")
def one(folder, tmp_path_factory) -> Path:
    logs = tmp_path_factory.mktemp("one")
    on_ranks(1, ON_CPU, same_training.train, folder, logs, CELLS)
    return logs


@pytest.fixture(scope="module", params=ENGINES)
def two(request, folder, tmp_path_factory) -> tuple[str, Path]:
    """An engine and its logs."""
    logs = tmp_path_factory.mktemp(request.param)
    on_ranks(2, ENGINES[request.param], same_training.train, folder, logs, CELLS)
    return request.param, logs


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_every_engine_trains_resumes_and_exports_as_one_process_does(cell, folder, one, two):
    engine, logs = two
    same_training.compare(cell, engine, folder, one, logs)
