"""What other packages say of prompts that are too long is said once, in our words."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import running
from diffusers.utils import logging as diffusers_logging

from flow_grpo.launch import quiet

ROOT = Path(__file__).parent.parent
LONG = "a red apple and two green cubes " * 20


def test_a_run_says_once_that_prompts_are_cut(files, fresh_logs):
    folder = files / "long"
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        (folder / f"{split}.txt").write_text("".join(f"{LONG}{n}\n" for n in range(4)))
    diffusers_logging.set_verbosity_warning()  # other tests want fewer
    running.train(running.arguments(files, run_name="long", dataset=folder, num_epochs=1))
    (once,) = (f for f in logging.getLogger("diffusers").handlers[0].filters if hasattr(f, "said"))
    assert isinstance(once, quiet.Once) and once.said


def test_the_first_cut_is_told_and_other_messages_pass():
    once = quiet.Once()

    def passes(text: str) -> str | None:
        record = logging.LogRecord("diffusers.x", logging.WARNING, "x.py", 1, text, (), None)
        return record.getMessage() if once.filter(record) else None

    cut = "The following part of your input was truncated because CLIP can only handle 77: ['x']"
    assert [passes(cut), passes(cut), passes("a shard is missing")] == [
        quiet.LONG,
        None,
        "a shard is missing",
    ]
    assert passes("Token indices sequence length is longer than the specified") is None


def test_that_torchvision_is_missing_is_not_said_and_other_absences_are():
    code = "import flow_grpo.diffusers_patch.registry as it, logging; it.FAMILIES\n"
    code += "logging.getLogger('transformers.utils.import_utils').warning('requires sentencepiece')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "torchvision" not in done.stderr and "requires sentencepiece" in done.stderr
