"""A checkpoint that can't be written: one message, the one before is whole, no half one stays."""

from __future__ import annotations

import os
import resource
import signal

import pytest
import running

from flow_grpo.launch import entry
from flow_grpo.training import checkpoint, folders

pytestmark = pytest.mark.usefixtures("fresh_logs")
PLACES = {  # the file that can't be written
    "weights": "weights-0.safetensors",
    "moments": "optimizer-0.safetensors",
    "index": "index.json",
    "export": "pytorch_lora_weights.safetensors",
    "trainer": folders.STATE,
}


def words(name: str) -> str:
    """What the system says: safetensors replaces a file, so there it is a folder in its place."""
    return "Is a directory" if name.endswith(".safetensors") else "No space left on device"


def arguments(files, **keys):
    keys = running.lora(files) | {"run_name": "full", "num_epochs": 4} | keys
    return running.arguments(files, **keys)


def fill(run, monkeypatch, name: str, epochs: set[int]) -> None:
    """Let a file of the checkpoints after these epochs be one that can't be written."""
    honest = checkpoint._empty

    def empty(aside):
        honest(aside)
        (aside / "lora").mkdir()
        if run.epoch in epochs:
            folder = aside / "lora" if name == PLACES["export"] else aside
            if name.endswith(".json"):
                (folder / name).symlink_to("/dev/full")
            else:
                (folder / name).mkdir()

    monkeypatch.setattr(checkpoint, "_empty", empty)


def left(run) -> list[str]:
    return sorted(path.name for path in (run.folder / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(place, marks=[] if place in ("weights", "trainer") else pytest.mark.slow)
        for place in PLACES
    ],
)
def test_it_is_one_message_and_the_checkpoint_before_is_whole(files, place, monkeypatch, capsys):
    run = running.prepare(arguments(files))
    fill(run, monkeypatch, PLACES[place], {2, 3, 4})
    assert entry.execute(run) == 1
    said = capsys.readouterr().err
    assert said.count(words(PLACES[place])) == 1 and "no checkpoint could be written" in said
    assert "1 finished epoch(s) could not be saved" in said and "To continue it: python" in said
    assert left(run) == ["checkpoint-2"]
    monkeypatch.undo()
    if place == "weights":
        resumed = running.train(arguments(files, resume_from="latest"))
        whole = running.train(arguments(files, run_name="whole"))
        assert running.metrics(resumed.folder) == running.metrics(whole.folder)


def test_a_run_may_go_on_without_a_checkpoint(files, monkeypatch, capsys):
    run = running.prepare(arguments(files, on_save_error="continue"))
    fill(run, monkeypatch, PLACES["weights"], {2})
    assert entry.execute(run) == 0
    said = capsys.readouterr()
    assert (said.out + said.err).count(words(PLACES["weights"])) == 1
    assert left(run) == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]


def test_a_last_checkpoint_that_can_not_be_written_is_an_error_all_the_same(
    files, monkeypatch, capsys
):
    run = running.prepare(arguments(files, on_save_error="continue"))
    fill(run, monkeypatch, PLACES["trainer"], {3, 4})
    assert entry.execute(run) == 1
    assert "2 finished epoch(s) could not be saved" in capsys.readouterr().err
    assert left(run) == ["checkpoint-2", "checkpoint-4"]


def limited(run) -> None:
    """Save where the system lets no file grow beyond some bytes, as a quota does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    run.saved = None
    try:
        checkpoint.save(run, 0)
    except OSError as error:
        os._exit(7 if "File too large" in str(error) else 8)
    os._exit(9)


def test_a_quota_is_told_as_the_system_s_error(files):
    run = running.train(arguments(files, num_epochs=1))
    child = os.fork()
    if child == 0:
        limited(run)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert left(run) == ["checkpoint-2"]
    assert folders.resume_point(resuming(run), run.identity) == folders.checkpoints(run.folder)[-1]


def resuming(run):
    config = run.config.copy_and_resolve_references()
    config.resume_from = "latest"
    return config
