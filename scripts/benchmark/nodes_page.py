"""The section of docs/results/faults.md that nodes.py measures; faults.py leaves it as it is."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

from flow_grpo.launch import provenance

OUT = Path(__file__).parents[2] / "docs/results/faults.md"
SECTION = "## Ranks and machines that fail"
NAMES = {
    "multi_gpu": "DDP",
    "deepspeed_zero2": "ZeRO-2",
    "deepspeed_zero3": "ZeRO-3",
    "fsdp2": "FSDP2",
}
WHAT = {
    "kill-rank": "`kill -9` of rank 1",
    "kill-main-rank": "`kill -9` of rank 0",
    "kill-launcher": "`kill -9` of the launcher",
    "term-launcher": "SIGTERM to the launcher",
    "error": "an error on rank 1, in its loss",
    "hang": "rank 1 hangs in its loss, {timeout_s} s allowed",
    "stop-rank": "`kill -STOP` of rank 1, {timeout_s} s allowed",
    "end-node": "two machines: none; seconds of the whole run",
    "kill-node": "two machines: `kill -9` of all of the second",
    "kill-main-node": "two machines: `kill -9` of all of the first",
    "term-node": "two machines: SIGTERM to the second's launcher",
    "unplug-node": "two machines: the cable is pulled; the first one's end",
}
HEAD = """{section}

Two ranks of the testbed on one machine; or one on each of two "machines", network namespaces that
a cable joins, which `scripts/multi_node/sd3/main.sh RANK` starts. In the midst of the run, after
its third epoch at least, something happens. A cell: seconds until the last process of the run was
gone, launchers included; then the epochs that are saved, of those that were finished (every second
one is saved anyway). Of the checkpoints left, every file's digest was compared: {broken} were
broken. {left} processes were left. `config.collective_timeout={timeout_s}`, where 300 is the
default: what waits for it takes longer by the difference. All over gloo; NCCL was not measured.

"""


def write_page(rows: list[dict], faults: list[str], engines: list[str], timeout_s: int) -> None:
    """Write the section anew. rows: what nodes.py measured, by fault and engine."""
    found = {(row["fault"], row["engine"]): row for row in rows}
    shown = [name for name in engines if any(row["engine"] == name for row in rows)]
    left = sum(row["left"] for row in rows)
    broken = sum(len(row["broken"]) for row in rows)
    head = HEAD.format(section=SECTION, left=left, broken=broken, timeout_s=timeout_s)
    table = [f"| fault | {' | '.join(NAMES[name] for name in shown)} |", "|---" * (len(shown) + 1)]
    table[1] += "|"
    told = []
    for fault in faults:
        cells = [_cell(found.get((fault, name))) for name in shown]
        what = WHAT[fault].format(timeout_s=timeout_s)
        if any(cells):
            table.append(f"| {what} | {' | '.join(cells)} |")
            of_fault = [found[fault, name] for name in shown if (fault, name) in found]
            told += [f"* {what} ({NAMES[row['engine']]}): {_said(row)}" for row in of_fault[-1:]]
    machine = provenance.machine()
    command = f"OMP_NUM_THREADS=1 python scripts/benchmark/nodes.py --engines {' '.join(shown)}"
    made = (
        f"```bash\n{command}\n```\n\nMachine: "
        f"{machine['cores']} cores of an {machine['cpu']}, shared with other work, "
        f"{machine['memory_gib']:.0f} GiB, no GPU; torch {version('torch')}, accelerate "
        f"{version('accelerate')}, DeepSpeed {version('deepspeed')}."
    )
    words = "What the last of these engines said (with the last lines of a traceback above it):"
    section = [head + "\n".join(table), words, "\n".join(told), made]
    before = OUT.read_text().partition(SECTION)[0].rstrip()
    OUT.write_text("\n\n".join([before, *section]) + "\n")


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    return f"{row['launchers_s']:.0f} s; {row['saved']} of {row['finished']}"


def _said(row: dict) -> str:
    """Join the lines that name a rank, without paths and commands."""
    lines = [re.sub(r"^\[\w+\]: |(\. )?To continue it.*", "", line) for line in row["said"]]
    lines = [line for line in lines if line]
    lines = [re.sub(r"in /\S+/logs/", "in logs/", line) for line in dict.fromkeys(lines)]
    lines = [re.sub(r"\[/\S+/gloo/\S+\] ", "", line) for line in lines]
    return "; ".join(f'"{line}"' for line in lines) or "nothing"
