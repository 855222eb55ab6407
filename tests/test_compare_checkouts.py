"""The same command runs in both checkouts, once for each state of their files."""

from __future__ import annotations

from pathlib import Path

import compare_checkouts
import mutants
import pytest
from compare_checkouts import Checkout, Command, told
from defects import DEFECTS

SCRIPT = """
import json, sys
from pathlib import Path

options = dict(argument.split("=", 1) for argument in sys.argv[1:])
run = Path(options["--config.logdir"], options["--config.run_name"])
run.mkdir()
row = {{"kind": "epoch", "epoch": 0, "step": 0, "loss": {loss}}}
row |= {{"rate": options["--config.{rate}"]}}
(run / "metrics.jsonl").write_text(json.dumps(row))
"""
COMMAND = Command("small", "train.py", "config/base.py:small", {"train.rate": 3})


def checkout(folder: Path, loss: str, rate: str = "train.rate", **more) -> Checkout:
    (folder / "scripts").mkdir(parents=True)
    (folder / "scripts" / "train.py").write_text(SCRIPT.format(loss=loss, rate=rate))
    return Checkout(folder, folder.parent / "cache", **{"names": {}, "given": {}} | more)


def test_the_numbers_of_two_checkouts_are_compared(tmp_path):
    old, same = checkout(tmp_path / "old", ".1 + .2"), checkout(tmp_path / "same", ".3 + 4e-17")
    lines, equal = told(COMMAND, old, same)
    assert equal and lines.split() == ["1", "5", "0", "equal"]
    lines, equal = told(COMMAND, old, checkout(tmp_path / "new", ".3"))
    assert not equal and lines.split()[:4] == ["1", "5", "1", "DIFFERS"]
    assert "loss 0.30000000000000004 -> 0.3" in lines


def test_a_key_of_the_old_command_line_has_its_old_name(tmp_path):
    old = checkout(tmp_path / "old", ".3", rate="lr", names={"train.rate": "lr"})
    assert told(COMMAND, old, checkout(tmp_path / "new", ".3"))[1]


def test_a_run_is_made_again_only_where_a_file_has_changed(tmp_path):
    new = checkout(tmp_path / "new", ".3")
    metrics = new.run(COMMAND) / "metrics.jsonl"
    metrics.write_text("kept")
    assert (new.run(COMMAND) / "metrics.jsonl").read_text() == "kept"
    script = new.folder / "scripts" / "train.py"
    script.write_text(script.read_text() + "\n")
    changed = Checkout(new.folder, tmp_path / "cache", {}, {})
    assert (changed.run(COMMAND) / "metrics.jsonl").read_text() != "kept"


def test_a_run_that_failed_or_whose_checkout_changed_has_no_numbers(tmp_path):
    new = checkout(tmp_path / "new", ".3")
    failing = checkout(tmp_path / "failing", "1 / 0")
    moving = checkout(tmp_path / "moving", "open('scripts/new.py', 'w').fileno()")
    for broken, why in ((failing, "exit status 1 in"), (moving, "was changed while it ran")):
        for _ in range(2):  # nor is it kept as if it were finished
            lines, equal = told(COMMAND, broken, new)
            assert not equal and lines.startswith("FAILED: ") and why in lines
            (broken.folder / "scripts" / "new.py").unlink(missing_ok=True)


def test_a_run_that_exists_already_is_not_made(tmp_path):
    new = checkout(tmp_path / "new", ".3")
    old = checkout(tmp_path / "old", "1 / 0", given={"small": new.run(COMMAND)})
    assert told(COMMAND, old, new)[1]


@pytest.mark.slow
def test_a_defect_changes_a_known_run_and_a_comment_does_not(tmp_path):
    (command,) = compare_checkouts.commands(["grpo:clipscore_sd3"], None, tmp_path)
    (defect,) = (defect for defect in DEFECTS if defect.name == "velocity-sign")
    old = Checkout(mutants.ROOT, tmp_path, {}, {})
    for text, verdict in ((mutants.mutated(defect), "DIFFERS"), (None, "equal")):
        with mutants.copied() as folder:
            file = folder / defect.file
            file.write_text(text or f"{file.read_text()}\n# the same\n")
            lines, _ = told(command, old, Checkout(folder, tmp_path, {}, {}))
        assert f" {verdict}" in lines
