"""Run every fuzzer of tests/ at length and write docs/results/faults.md.

    python scripts/benchmark/faults.py [--seed 0] [--only data lora]

Exit status 1 if a case was neither refused as promised nor read as it stands.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from nodes_page import SECTION
from tqdm import tqdm

from flow_grpo.launch import provenance

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs/results/faults.md"
COUNTS = {"config": 10_000, "requests": 10_000}  # of the others 1,000
PACKAGES = ("torch", "safetensors", "peft", "diffusers", "pillow", "numpy")
HEAD = """# What damaged files and hostile inputs come to

Each case is made from a seed, tried in a process that has tried all before it, and judged.
**Refused**: by the promised `ValueError` (or answer of the server) that names what is at fault,
with nothing changed. **Read and equal**: to what an independent reader finds in the same bytes
(of command lines: all checks passed). **Anything else** is a fault: another exception, other
values, a changed disk, an executed payload, no answer in 10 minutes. The default tests run some
cases of each.

| fuzzer | cases | refused | read and equal | anything else | seconds | peak memory |
|---|---|---|---|---|---|---|
"""


REQUESTS = """To a reward server and its clients, where what is refused is an answer that says why,
and "no answer" a connection that its sender broke off or let idle; named cases have a row each:

"""


def fuzzers(chosen: list[str]) -> list[str]:
    """Name the files tests/fuzz_<name>.py that can be run."""
    files = sorted((ROOT / "tests").glob("fuzz_*.py"))
    known = [f.stem.removeprefix("fuzz_") for f in files if "__main__" in f.read_text()]
    if unknown := set(chosen) - set(known):
        sys.exit(f"no fuzzer {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return chosen or known


def run(name: str, seed: int) -> tuple[list[str], int]:
    """Return a fuzzer's row, or a table of its own, and its exit status.

    What it tells of faults goes to stderr.
    """
    count = COUNTS.get(name, 1000)
    command = [sys.executable, f"tests/fuzz_{name}.py", f"--count={count}", f"--seed={seed}"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    if not rows:
        sys.exit(f"{' '.join(command)} printed no row")
    return rows, done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="print these rows, write no page")
    args = parser.parse_args()
    done = [run(name, args.seed) for name in tqdm(fuzzers(args.only), "fuzzers", disable=None)]
    rows = "\n".join(rows[0] for rows, _ in done if len(rows) == 1)
    tables = "\n\n".join("\n".join(rows) for rows, _ in done if len(rows) > 1)
    machine = provenance.machine()
    print(rows, tables, sep="\n\n")
    if not args.only:
        versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
        command = f"OMP_NUM_THREADS=1 python scripts/benchmark/faults.py --seed {args.seed}"
        made = (
            f"Seconds and memory include the making of the cases and the tiny models that they are "
            f"tried on.\nMachine: {machine['cores']} cores of an {machine['cpu']}, "
            f"{machine['memory_gib']:.0f} GiB, no GPU used; Python {platform.python_version()}, "
            f"{versions}."
        )
        parts = (HEAD + rows, REQUESTS + tables, f"```bash\n{command}\n```", made)
        _, _, others = OUT.read_text().partition(SECTION)
        OUT.write_text("\n\n".join((*parts, SECTION + others)))
    return max(status for _, status in done)


if __name__ == "__main__":
    sys.exit(main())
