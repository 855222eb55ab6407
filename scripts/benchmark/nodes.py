"""Kill, stop and hang ranks, launchers and whole machines, and tell what becomes of the rest.

    python scripts/benchmark/nodes.py [--only kill-rank ...] [--engines multi_gpu fsdp2 ...]

A run of two ranks of the testbed is started by accelerate's launcher; or, for what ends in "node",
one rank on each of two "machines": network namespaces that a cable (veth) joins, each started by
`scripts/multi_node/sd3/main.sh RANK`. That needs root. What is measured is kept in
logs/nodes/rows.jsonl, so that a second call goes on; the table of docs/results/faults.md is then
written anew. Exit status 1 if a process was left, or a checkpoint can't be resumed from.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from nodes_page import write_page

from flow_grpo.diffusers_patch.sd3 import SD3
from flow_grpo.launch import entry
from flow_grpo.training import digests, folders

ROOT = Path(__file__).parents[2]
LOGS = ROOT / "logs" / "nodes"
CONFIG = "config/testbed.py:shapes_sd3_short"
MARK = "FLOW_GRPO_BENCHMARK"  # in the environment of all processes of a run
ENGINES = ("multi_gpu", "deepspeed_zero2", "deepspeed_zero3", "fsdp2")
TIMEOUT_S = 30  # config.collective_timeout
MOST_S = 900.0
KEYS = {"num_epochs": 1000, "save_freq": 2, "eval_freq": 1000, "collective_timeout": TIMEOUT_S}
KEYS |= {"sample.train_batch_size": 24, "train.gradient_accumulation_steps": 1, "tracker": "none"}
NODES = ("flowA", "flowB")
ADDRESS = "10.77.0.{}"


def processes(run: str) -> dict[int, dict[str, str]]:
    """Find the living processes of a run, and what is in their environments."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environ = (folder / "environ").read_text(errors="replace").split("\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        words = dict(each.split("=", 1) for each in environ if "=" in each)
        if words.get(MARK) == run and state != "Z":
            found[int(folder.name)] = words
    return found


def ranks(run: str, number: int | None = None) -> list[int]:
    """Find the processes of a rank, or of all."""
    is_rank = {pid: env.get("RANK") for pid, env in processes(run).items()}
    return [pid for pid, rank in is_rank.items() if rank and number in (None, int(rank))]


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        os.kill(pid, number)


class Runs:
    """The launchers of a run of two ranks, on one machine or on two."""

    def __init__(self, fault: str, engine: str):
        self.name = f"{fault}-{engine}"
        self.folder = LOGS / self.name
        self.output = LOGS / f"{self.name}.txt"
        subprocess.run(["rm", "-rf", self.folder], check=True)
        self.launchers: list[subprocess.Popen] = []
        keys = KEYS | {"logdir": LOGS, "run_name": self.name}
        keys |= {"num_epochs": 4} if fault.startswith("end") else {}
        self.arguments = ["--config", CONFIG, *(f"--config.{k}={v}" for k, v in keys.items())]
        self.env = os.environ | {MARK: self.name, "FAULT": fault, "OMP_NUM_THREADS": "1"}
        self.env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.env |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}  # as launch.sh has it
        if "deepspeed" not in engine:
            self.env["ACCELERATE_USE_CPU"] = "true"
        with self.output.open("w") as out:
            starts = self._nodes(engine) if fault.endswith("node") else [self._single(engine)]
            for command, more in starts:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=self.env | more, stdout=out, stderr=out
                )
                self.launchers.append(process)

    def _single(self, engine: str) -> tuple[list[str], dict]:
        config = f"scripts/accelerate_configs/{engine}.yaml"
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
        launch += ["--num_processes", "2", "--main_process_port", "0", __file__, "train"]
        return [*launch, *self.arguments], {}

    def _nodes(self, engine: str) -> list[tuple[list[str], dict]]:
        both = {"MASTER_ADDR": ADDRESS.format(1), "NUM_NODES": "2", "NUM_GPUS": "1"}
        both |= {"ACCELERATE_CONFIG": engine}
        script = ["bash", "scripts/multi_node/sd3/main.sh"]
        return [
            (
                ["ip", "netns", "exec", node, *script, str(n), *self.arguments],
                both | {"GLOO_SOCKET_IFNAME": node},
            )
            for n, node in enumerate(NODES)
        ]

    def num_epochs(self) -> int:
        path = self.folder / "metrics.jsonl"
        rows = path.read_text().splitlines() if path.exists() else []
        return sum('"kind": "epoch"' in row for row in rows)

    def wait_until(self, condition: Callable[[], bool]) -> float:
        """Return how many seconds it took."""
        start = time.monotonic()
        while not condition():
            if time.monotonic() - start > MOST_S:
                kill(list(processes(self.name)))
                sys.exit(f"{self.name}: hangs; see {self.output}")
            time.sleep(0.1)
        return time.monotonic() - start

    def node(self, number: int) -> list[int]:
        """Find all processes of a machine."""
        listed = subprocess.run(
            ["ip", "netns", "pids", NODES[number]], capture_output=True, text=True, check=True
        )
        return [int(pid) for pid in listed.stdout.split()]


def unplug(runs: Runs) -> None:
    subprocess.run(["ip", "-n", NODES[1], "link", "set", NODES[1], "down"], check=True)


FAULTS: dict[str, Callable[[Runs], None]] = {
    "kill-rank": lambda runs: kill(ranks(runs.name, 1)),
    "kill-main-rank": lambda runs: kill(ranks(runs.name, 0)),
    "kill-launcher": lambda runs: runs.launchers[0].kill(),
    "term-launcher": lambda runs: runs.launchers[0].terminate(),
    "error": lambda runs: (LOGS / "go").touch(),
    "hang": lambda runs: (LOGS / "go").touch(),
    "stop-rank": lambda runs: kill(ranks(runs.name, 1), signal.SIGSTOP),
    "end-node": lambda runs: None,
    "kill-node": lambda runs: kill(runs.node(1)),
    "kill-main-node": lambda runs: kill(runs.node(0)),
    "term-node": lambda runs: runs.launchers[1].terminate(),
    "unplug-node": unplug,
}


def measure(fault: str, engine: str) -> dict:
    """Let a fault happen to a run under way, and watch what is left of it until it is gone."""
    (LOGS / "go").unlink(missing_ok=True)
    if fault.endswith("node"):
        remove_nodes()
        make_nodes()
    runs = Runs(fault, engine)
    try:
        if fault != "end-node":
            runs.wait_until(lambda: runs.num_epochs() >= 3 or not processes(runs.name))
        before = len(folders.checkpoints(runs.folder)) if runs.folder.exists() else 0
        FAULTS[fault](runs)
        spared = set(runs.node(1)) if fault == "unplug-node" else set()
        ranks_s = runs.wait_until(lambda: not set(ranks(runs.name)) - spared)
        launchers_s = ranks_s + runs.wait_until(lambda: not set(processes(runs.name)) - spared)
        statuses = [each.wait() for each in runs.launchers] if not spared else []
    finally:
        left = len(set(processes(runs.name)))
        kill(list(processes(runs.name)))
        if fault.endswith("node"):
            remove_nodes()
    return judged(runs, before) | {
        "fault": fault,
        "engine": engine,
        "ranks_s": round(ranks_s, 1),
        "launchers_s": round(launchers_s, 1),
        "statuses": statuses,
        "left": left if not spared else 0,
    }


def judged(runs: Runs, before: int) -> dict:
    """Tell how far the run came, what was saved of it, and what it said."""
    saved = folders.checkpoints(runs.folder)
    states = [folders.read(folder) for folder in saved]
    files = [state["files"] for state in states]
    broken = [digests.problem(*each) for each in zip(saved, files, strict=True)]
    output = runs.output.read_text()
    said = [line for line in output.splitlines() if re.search(r"rank \d|stopped by|store of", line)]
    return {
        "finished": runs.num_epochs(),
        "saved": max((state["epoch"] for state in states), default=0),
        "checkpoints": len(saved) - before,
        "broken": [problem for problem in broken if problem],
        "said": said,
    }


def make_nodes() -> None:
    """Make two machines that a cable joins. Needs root."""
    a, b = NODES
    commands = [f"netns add {node}" for node in NODES]
    commands += [f"link add {a} type veth peer name {b}"]
    for number, node in enumerate(NODES, 1):
        commands += [f"link set {node} netns {node}"]
        commands += [f"-n {node} addr add {ADDRESS.format(number)}/24 dev {node}"]
        commands += [f"-n {node} link set {name} up" for name in (node, "lo")]
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True)


def remove_nodes() -> None:
    for node in NODES:
        subprocess.run(["ip", "netns", "del", node], capture_output=True, check=False)


def train(argv: list[str]) -> None:
    """Be a rank of a run: the training script, which on rank 1 hangs or fails when it is told."""
    run = entry.prepare(argv, SD3, CONFIG)
    fault, honest = os.environ["FAULT"], run.objective.loss

    def loss(*arguments):
        while (LOGS / "go").exists() and run.ranks.rank == 1:
            if fault == "error":
                raise RuntimeError("out of luck")
            time.sleep(1.0)
        return honest(*arguments)

    run.objective.loss = loss
    entry.leave(entry.execute(run))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=list(FAULTS), choices=FAULTS)
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=ENGINES)
    args = parser.parse_args()
    if any(fault.endswith("node") for fault in args.only) and os.geteuid() != 0:
        sys.exit(
            "two machines are network namespaces, which need root; leave out what ends in node"
        )
    LOGS.mkdir(parents=True, exist_ok=True)
    file = LOGS / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(row["fault"], row["engine"]) for row in rows}
    for fault in args.only:
        for engine in args.engines:
            if (fault, engine) not in done:
                rows.append(row := measure(fault, engine))
                print(json.dumps(row), flush=True)
                with file.open("a") as out:
                    out.write(json.dumps(row) + "\n")
    write_page(rows, list(FAULTS), list(ENGINES), TIMEOUT_S)
    return int(any(row["left"] or row["broken"] for row in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train([sys.argv[0], *sys.argv[2:]])
    sys.exit(main())
