"""Run the parts of the GPU kit, each in a process of its own and within its time; see gpu.sh.

    bash scripts/benchmark/gpu.sh --out logs/gpu [--device cuda] [--seconds 540] [part ...]

What is done is in --out: a JSON file for each part, results.json and summary.md for all. A part
that is done is skipped, one that was cut short goes on: repeat the command until all is done. To do
a part again, delete its file. Exit status 1: a check failed, or not all is done.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from scripts.benchmark.gpu_parts import PARTS
from scripts.benchmark.gpu_rows import Part, Setting

ROOT = Path(__file__).parents[2]
END_S = 5.0  # less than this is too little for another part


class State:
    """What one part has found so far, in a file; a row counts as soon as it is there."""

    def __init__(self, out: Path, name: str, setting: Setting):
        self.path = out / "parts" / f"{name}.json"
        self.content = {"part": name, "setting": setting.key, "done": False, "note": "", "rows": []}
        if self.path.exists():
            written = json.loads(self.path.read_text())
            if written["setting"] == setting.key:  # of another device or size nothing counts
                self.content = written

    @property
    def names(self) -> set[str]:
        return {row["name"] for row in self.content["rows"]}

    @property
    def done(self) -> bool:
        return self.content["done"]

    def add(self, row: dict) -> None:
        others = [other for other in self.content["rows"] if other["name"] != row["name"]]
        self.write(rows=[*others, row])

    def write(self, **values) -> None:
        self.content |= values
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".tmp")
        aside.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(aside, self.path)


def run_part(part: Part, setting: Setting, out: Path) -> None:
    """Run one part in this process, writing each row as it comes."""
    if setting.device == "cuda":
        import torch

        if not torch.cuda.is_available():  # else it would pass on a CPU
            raise SystemExit("torch sees no GPU; --device cpu rehearses the kit without one.")
    state = State(out, part.name, setting)
    state.write(note="")
    for row in part.rows(setting, state.names):
        state.add(row._asdict())
        print(f"{part.name}: {line(row._asdict())}", flush=True)
    state.write(done=True, **versions())


def versions() -> dict[str, dict[str, str]]:
    """Return the version here of each package that constraints.txt names; "none" without it."""
    numbers = {"python": sys.version.split()[0]}
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    for name in (pin.split("==")[0] for pin in pins if "==" in pin):
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            numbers[name] = "none"
    return {"versions": numbers}


def gpu_name() -> str:
    """Name the first GPU as its driver does, without torch; "" if there is none."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout.splitlines() or [""])[0]


def spawn(command: list[str], limit_s: float) -> str:
    """Run a command within its time, or end all of it; returns why it did not end well, or ""."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"stopped after {limit_s:.0f} s"
    return f"ended with status {status}" if status else ""


def run_all(
    parts: Iterable[Part],
    setting: Setting,
    out: Path,
    execute: Callable[[Part, float], str],
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run what is not done, in order, while there is time.

    execute: runs a part for some seconds at most; returns why it did not end well, or "".
    """
    deadline = clock() + seconds
    for part in parts:
        left = deadline - clock()
        if not State(out, part.name, setting).done and left > END_S:
            why = execute(part, min(part.limit_s, left))
            if why:
                State(out, part.name, setting).write(note=why)


def passed(states: Iterable[dict]) -> bool:
    return all(s["done"] and all(row["passed"] for row in s["rows"]) for s in states)


def line(row: dict) -> str:
    return f"{'PASS' if row['passed'] else 'FAIL'}  {row['name']}: {row['figures']}"


def table(states: Iterable[dict]) -> str:
    """Return a Markdown table of what was found, and what is not done."""
    lines = ["| part | check | | figures |", "|---|---|---|---|"]
    for state in states:
        for row in state["rows"]:
            outcome = "pass" if row["passed"] else "**FAIL**"
            lines.append(f"| {state['part']} | {row['name']} | {outcome} | {row['figures']} |")
        if not state["done"]:
            lines.append(f"| {state['part']} | | **not done** | {state['note']} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="part", help=f"all, or of {', '.join(p.name for p in PARTS)}"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=Path("logs/gpu"))
    parser.add_argument("--scratch", type=Path, help="for runs and models; default: OUT-scratch")
    parser.add_argument("--epochs", type=int, default=3, help="of the testbed's runs")
    parser.add_argument("--small", action="store_true", help="the least that says something")
    parser.add_argument("--seconds", type=float, default=3600.0, help="for all parts together")
    parser.add_argument("--within", metavar="part", help=argparse.SUPPRESS)
    args = parser.parse_args(argv[1:])
    known = {part.name: part for part in PARTS if args.device in part.devices}
    if unknown := set(args.parts) - set(known):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    out = args.out.resolve()
    scratch = (args.scratch or out.with_name(f"{out.name}-scratch")).resolve()
    setting = Setting(args.device, gpu_name(), args.epochs, args.small, scratch)
    if args.within:
        run_part(known[args.within], setting, out)
        return 0

    options = [f"--device={args.device}", f"--out={out}", f"--scratch={scratch}"]
    options += [f"--epochs={args.epochs}", *["--small"] * args.small]

    def execute(part: Part, limit_s: float) -> str:
        return spawn([sys.executable, __file__, "--within", part.name, *options], limit_s)

    chosen = [known[name] for name in args.parts or known]
    run_all(chosen, setting, out, execute, args.seconds)
    states = {part.name: State(out, part.name, setting).content for part in known.values()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(states, indent=1) + "\n")
    (out / "summary.md").write_text(table(states.values()) + "\n")
    print(f"\n{table(states.values())}\n\n{out / 'results.json'}")
    return 0 if passed(states[part.name] for part in chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
