"""Two runs are equal only if every number is, to the last bit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import compare_runs
import pytest
import torch
from compare_runs import compare, differ
from safetensors.torch import save_file

UPDATE = {"kind": "update", "epoch": 0, "step": 1, "loss": 0.1, "kl": 2.0, "kl/0": 2.0}
EPOCH = {"kind": "epoch", "epoch": 0, "step": 1, "reward/avg": 0.5, "seconds/sample": 3.0}
LORA = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def write(folder: Path, *rows: dict, lora: torch.Tensor = LORA, gate: float = 0.0) -> Path:
    last = folder / "checkpoints" / "checkpoint-10"
    for made in (last / "lora", folder / "checkpoints" / "checkpoint-9"):
        made.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "gate.json").write_text(json.dumps({"epoch": 0, "log_ratio": {"0": gate}}))
    save_file({"down.weight": lora}, last / "lora" / "pytorch_lora_weights.safetensors")
    return folder


@pytest.fixture
def old(tmp_path) -> Path:
    return write(tmp_path / "old", UPDATE, EPOCH)


def test_a_run_equals_itself_whatever_time_it_took(old, tmp_path):
    new = write(tmp_path / "new", UPDATE, EPOCH | {"seconds/sample": 9.0})
    result = compare(old, new)
    assert result.verdict == "equal" and not result.differing and not result.notes
    assert result.num_rows == 2
    assert result.num_values == len(UPDATE) + len(EPOCH) - 1 + 2 + 1  # two of the gate, a tensor


def test_a_last_bit_of_a_metric_is_found(old, tmp_path):
    loss = math.nextafter(UPDATE["loss"], 1)
    result = compare(old, write(tmp_path / "new", UPDATE | {"loss": loss}, EPOCH))
    assert result.differing == [f"update, epoch 0, step 1: loss 0.1 -> {loss!r}"]
    assert result.verdict == "DIFFERS"


def test_a_last_bit_of_a_weight_and_of_the_gate_is_found(old, tmp_path):
    lora = LORA.clone()
    lora[1, 0] = torch.nextafter(lora[1, 0], torch.tensor(9.0))
    result = compare(old, write(tmp_path / "new", UPDATE, EPOCH, lora=lora, gate=1e-30))
    assert result.differing == [
        "gate: gate/log_ratio/0 0.0 -> 1e-30",
        "checkpoint-10/lora: down.weight 1 of 4 elements, "
        f"[2] 3.0 -> {torch.nextafter(LORA[1, 0], torch.tensor(9.0)).item()!r}",
    ]


def test_a_row_a_key_and_a_checkpoint_that_are_gone_are_differences(old, tmp_path):
    new = write(tmp_path / "new", {k: v for k, v in UPDATE.items() if k != "kl"})
    (new / "checkpoints" / "checkpoint-10").rename(new / "checkpoints" / "checkpoint-8")
    assert compare(old, new).differing == [
        "update, epoch 0, step 1: kl gone",
        "epoch, epoch 0, step 1: gone",
        "checkpoint-10/lora: gone",
    ]


def test_what_is_new_is_noted_once(old, tmp_path):
    more = [UPDATE | {"ratio": 1.0}, UPDATE | {"step": 2, "ratio": 1.0}]
    first = write(tmp_path / "first", UPDATE, UPDATE | {"step": 2}, EPOCH)
    result = compare(first, write(tmp_path / "new", *more, EPOCH))
    assert result.verdict == "equal" and list(result.notes) == ["new: update ratio"]
    result = compare(old, write(tmp_path / "longer", UPDATE, UPDATE, EPOCH))
    assert list(result.notes) == ["new: update, epoch 0, step 1, again 1"]


def test_a_renamed_key_is_compared_under_its_new_name(old, tmp_path, monkeypatch):
    new = dict(UPDATE, reference_kl=UPDATE["kl"]) | {"reference_kl/0": 7.0}
    del new["kl"], new["kl/0"], new["loss"]
    monkeypatch.setattr(compare_runs, "RENAMED", {"kl": "reference_kl", "loss": None})
    result = compare(old, write(tmp_path / "new", new, EPOCH))
    assert result.differing == ["update, epoch 0, step 1: reference_kl/0 2.0 -> 7.0"]
    assert not result.notes


def test_values_are_compared_by_their_bits():
    nan = math.nan
    assert differ(nan, nan) is None and differ(1, 1.0) is None
    assert differ(0.0, -0.0) == "0.0 -> -0.0" and differ(1.0, None) == "1.0 -> None"
    assert differ(torch.tensor([nan, 1]), torch.tensor([nan, 1])) is None
    assert differ(torch.tensor(0.0), torch.tensor(-0.0)) == "1 of 1 elements, [0] 0.0 -> -0.0"
    assert differ(torch.zeros(2), torch.zeros(1)) == "torch.float32 (2,) -> torch.float32 (1,)"


def test_runs_without_a_number_in_common_are_not_equal(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("")
    assert compare(tmp_path / "old", tmp_path / "new").verdict == "NOTHING COMPARED"
