"""How a run was started: the command, the code, the libraries, the machine."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from ml_collections import ConfigDict

from config.base import keys_of
from flow_grpo import keys
from flow_grpo.cli import redacted
from flow_grpo.parallel import choose
from flow_grpo.plan import Plan
from flow_grpo.report.facts import PER_RUN
from flow_grpo.training import folders
from flow_grpo.training.checkpoint import PACKAGES

FILE = "launches.json"
ROOT = Path(__file__).parents[2]


def record(folder: Path, argv: list[str], num_ranks: int, resume_from: Path | None) -> None:
    """Add a launch to the run's launches.json; a run that starts anew forgets earlier ones."""
    path, earlier = folder / FILE, []
    own = resume_from and folders.holds(folder, resume_from)
    if own and path.exists():
        earlier = _launches(path)
    aside = path.with_suffix(".tmp")
    launch = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(argv, num_ranks),
        "resumed_from": resume_from and (resume_from.name if own else str(resume_from)),
        "revision": revision(),
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
    }
    aside.write_text(json.dumps([*earlier, launch], indent=2) + "\n")
    os.replace(aside, path)


def _launches(path: Path) -> list:
    """Read earlier launches; of a file that no run wrote so, say that it is replaced."""
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list):
        print(f"{path} is damaged; it begins anew.", flush=True)
        return []
    return found


def command(argv: Sequence[str], num_ranks: int, **keys: object) -> str:
    """Return, to be pasted, the command that starts this again with some of the config's keys set.

    Without secrets of URLs, as logs and files keep it. Of accelerate's launcher only the kind and
    the number of processes are known.
    """
    given = [f"--config.{key}={value}" for key, value in keys.items()]  # the last of a key counts
    kept = [argument for argument in argv if argument not in given]
    return f"{choose.launcher(num_ranks)} {shlex.join(redacted([*kept, *given]))}"


def differences(config: ConfigDict, plan: Plan, resumed: Path) -> str:
    """Say in what a run differs from the one that wrote a checkpoint; "" if in nothing."""
    state, ours = folders.read(resumed), redacted(json.loads(config.to_json_best_effort()))
    found = [
        f"config.{key}={keys.at(ours, key)!r} (was {keys.at(state['config'], key)!r})"
        for key in keys_of(config)
        if state.get("config") and key not in (*PER_RUN, "num_epochs")
        if keys.at(ours, key) != keys.at(state["config"], key)
    ]
    if state.get("prompts", folders.digest(plan.train_prompts)) != folders.digest(
        plan.train_prompts
    ):
        found.append("other training prompts")
    for what, number in folders.cut(plan).items():
        if (was := keys.at(state.get("cut"), what)) not in (None, number):
            found.append(f"{number} {what} (was {was})")
    for package in PACKAGES:
        was = keys.at(state.get("versions"), package)
        if was not in (None, version(package)):
            found.append(f"{package} {version(package)} (was {was})")
    return f"{resumed} goes on with: {', '.join(found)}" if found else ""


def revision() -> str | None:
    """Return the code's git commit, with "+" behind it if files were changed; None without git."""
    try:
        commit = _git("rev-parse", "HEAD").strip()
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def machine() -> dict:
    """Return what this process runs on; threads are those of torch."""
    devices = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [f"{count} x {name}" for name, count in devices.items()],
        "system": platform.system(),
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=20
    ).stdout
