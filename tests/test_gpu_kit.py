"""The GPU kit, without a GPU: what is run, what is skipped, what is kept and what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import HANG_S, wait_until

from scripts.benchmark import gpu, gpu_parts
from scripts.benchmark.gpu_parts import PARTS
from scripts.benchmark.gpu_rows import Part, Row, Setting

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setting(tmp_path):
    return Setting("cpu", "", epochs=1, small=True, scratch=tmp_path / "scratch")


def part(name: str, *rows: Row, fails_after: int | None = None, limit_s: float = 60.0) -> Part:
    """A part of these rows that breaks off behind some of them, the first time."""
    broken = []

    def run(setting, known):
        for number, row in enumerate(rows):
            if number == fails_after and not broken:
                broken.append(1)
                raise RuntimeError("the machine was taken back")
            if row.name not in known:
                yield row

    return Part(name, run, limit_s)


class Machine:
    """Runs parts in this process, and says what it was asked for; each takes 100 s."""

    def __init__(self, setting, out):
        self.setting, self.out, self.asked, self.seconds = setting, out, [], 0.0

    def __call__(self, part: Part, limit_s: float) -> str:
        self.asked.append((part.name, limit_s))
        self.seconds += 100.0
        try:
            gpu.run_part(part, self.setting, self.out)
        except RuntimeError as error:
            return str(error)
        return ""

    def run(self, parts, seconds=1e6) -> list[dict]:
        gpu.run_all(parts, self.setting, self.out, self, seconds, clock=lambda: self.seconds)
        return [gpu.State(self.out, part.name, self.setting).content for part in parts]


GOOD, BAD = Row("good", True, "as it should be"), Row("bad", False, "0.3 (at most 0.1)")


def test_parts_that_are_done_are_not_run_again(setting, tmp_path):
    parts = [part("first", GOOD), part("second", BAD)]
    machine = Machine(setting, tmp_path)
    assert machine.run(parts) == machine.run(parts)
    assert machine.asked == [("first", 60.0), ("second", 60.0)]


def test_a_part_that_was_cut_short_goes_on_behind_its_last_row(setting, tmp_path):
    interrupted = part("one", GOOD, BAD, fails_after=1)
    machine = Machine(setting, tmp_path)
    (state,) = machine.run([interrupted])
    assert not state["done"] and state["note"] == "the machine was taken back"
    assert [row["name"] for row in state["rows"]] == ["good"] and not gpu.passed([state])
    (state,) = machine.run([interrupted])
    assert state["done"] and state["note"] == ""
    assert [row["name"] for row in state["rows"]] == ["good", "bad"]


def test_no_part_gets_more_time_than_it_may_have_and_than_is_left(setting, tmp_path):
    parts = [part("a", GOOD, limit_s=120), part("b", GOOD, limit_s=120), part("c", GOOD)]
    machine = Machine(setting, tmp_path)
    states = machine.run(parts, seconds=150)
    assert machine.asked == [("a", 120), ("b", 50)]
    assert [state["done"] for state in states] == [True, True, False]


def test_what_was_found_on_another_device_or_at_another_size_does_not_count(setting, tmp_path):
    machine = Machine(setting, tmp_path)
    machine.run([part("one", GOOD)])
    for other in (setting._replace(device="cuda", gpu="H100"), setting._replace(small=False)):
        assert not gpu.State(tmp_path, "one", other).done


def test_all_is_well_only_if_all_is_done_and_every_check_passed(setting, tmp_path):
    first, second = Machine(setting, tmp_path).run([part("first", GOOD), part("second", BAD)])
    assert gpu.passed([first]) and not gpu.passed([first, second])
    assert not gpu.passed([first | {"done": False}])


def test_the_table_has_a_line_for_each_check_and_each_part_that_is_not_done(setting, tmp_path):
    first, second = Machine(setting, tmp_path).run([part("first", GOOD), part("second", BAD)])
    lines = gpu.table([first, second | {"done": False, "note": "stopped after 240 s"}]).split("\n")
    assert lines[2:] == [
        "| first | good | pass | as it should be |",
        "| second | bad | **FAIL** | 0.3 (at most 0.1) |",
        "| second | | **not done** | stopped after 240 s |",
    ]


def running(pid: str) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_part_that_hangs_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    pids = tmp_path / "pids"

    class Hanging(subprocess.Popen):
        """Its time is up once it has started a process of its own."""

        def wait(self, timeout=None):
            if timeout is None:
                return super().wait()
            wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(subprocess, "Popen", Hanging)
    script = f"sleep 3600 & echo $$ $! > {pids}; wait"
    assert gpu.spawn(["bash", "-c", script], 30.0) == "stopped after 30 s"
    for pid in pids.read_text().split():
        wait_until(lambda pid=pid: not running(pid))


@pytest.mark.parametrize(
    "changed, passes",
    [
        ({}, True),
        ({"before": 0.505}, True),
        ({"before": 0.515}, False),
        ({"grad_norm": 2.2}, False),
        ({"after": float("nan")}, False),
    ],
)
def test_a_run_passes_within_the_tolerance_of_its_precision(tmp_path, changed, passes):
    reference = {"before": 0.5, "after": 0.6, "grad_norm": 2.0}
    folders = {"wanted": reference, "found": reference | changed}
    gate = {"epoch": 0, "log_ratio": {"0": 0.0, "2": 3e-6}, "velocity": {}}
    for name, values in folders.items():
        folder = tmp_path / name
        folder.mkdir()
        rows = [{"kind": "eval", "avg": values["before"]}]
        rows += [{"kind": "update", "grad_norm": values["grad_norm"]}]
        rows += [{"kind": "epoch", "images_per_second": 8.0, "skipped_updates": 0}]
        rows += [{"kind": "eval", "avg": values["after"]}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "gate.json").write_text(json.dumps(gate))
    row = gpu_parts.compare("run bf16", tmp_path / "wanted", tmp_path / "found")
    assert row.passed == passes and ", gate log_ratio 3e-06, " in row.figures


def test_a_pipeline_that_refuses_a_precision_passes_and_one_that_fails_does_not(setting):
    import tiny

    folder = tiny.save("flux", setting.scratch / "flux")
    row = gpu_parts.verified("flux", folder, "fp16", "cpu", gpu_parts.TINY)
    assert row.passed and "overflows in fp16" in row.figures
    row = gpu_parts.verified("flux", setting.scratch / "nowhere", "fp32", "cpu", gpu_parts.TINY)
    assert not row.passed and "there is no such folder" in row.figures


def test_a_tiny_pipeline_is_verified_unless_it_is_known(setting):
    (row,) = gpu_parts.verify("fp32")(setting, set())
    assert row.name == "sd3" and row.passed and row.figures.endswith(" checks passed")
    assert list(gpu_parts.verify("fp32")(setting, {"sd3"})) == []


def kit(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "benchmark" / "gpu.sh"), *arguments],
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )


def test_a_wrong_part_is_named_with_those_there_are():
    done = kit("--device", "cpu", "verify-fp16")
    assert done.returncode == 2 and "no part verify-fp16; there are machine, " in done.stderr


@pytest.mark.slow
def test_the_kit_is_rehearsed_on_a_cpu(tmp_path):
    options = ["--device", "cpu", "--small", "--epochs", "1", "--out", str(tmp_path / "out")]
    done = kit(*options)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results) == [part.name for part in PARTS if "cpu" in part.devices]
    for state in results.values():
        assert state["done"] and all(row["passed"] for row in state["rows"])
        assert state["versions"]["torch"] != "none"
    assert {row["name"] for row in results["testbed-grpo"]["rows"]} == {
        "shapes_sd3_grpo fp32",
        "shapes_sd3_grpo bf16",
    }
    assert ", gate log_ratio 0," in (tmp_path / "out" / "summary.md").read_text()
    again = kit(*options)
    assert again.returncode == 0 and "PASS" not in again.stdout  # nothing was done anew
