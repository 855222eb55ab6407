"""Put each known defect of defects/ into a copy of the code; the test it names must fail there.

    python tests/mutants.py [name ...] [--jobs 2]

A defect that its test lets pass is a hole in the tests.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest
from defects import DEFECTS
from defects.defect import Defect
from forking import FORKED
from tqdm import tqdm
from waiting import HANG_S

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("config", "flow_grpo", "tests", "pyproject.toml")
LINKED = ("dataset", "scripts")  # no defect is put there
BY_ASSERTION = ("assert ", "AssertionError", "Failed: DID NOT RAISE")
REPORT, OUTPUT = "report.xml", "output.txt"


@dataclass(frozen=True)
class Outcome:
    killed: bool
    reason: str  # what the test said, or why nothing can be concluded
    seconds: float


def mutated(defect: Defect, root: Path = ROOT) -> str:
    """Return the file's text with the defect. Raises ValueError unless its old text is there once.

    root: where the file is read from.
    """
    text = (root / defect.file).read_text()
    if (found := text.count(defect.old)) != 1:
        raise ValueError(
            f"defect {defect.name!r}: its old text stands {found} times in {defect.file}; once is "
            f"needed. Bring it up to date in tests/defects/. It is:\n{defect.old}"
        )
    return text.replace(defect.old, defect.new)


@contextmanager
def copied() -> Iterator[Path]:
    """Copy what the tests need into a folder that is deleted afterwards."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        for name in COPIED:
            source, target = ROOT / name, Path(folder, name)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        for name in LINKED:
            Path(folder, name).symlink_to(ROOT / name, target_is_directory=True)
        yield Path(folder)


def run_tests(
    folder: Path, tests: Iterable[str], patience_s: float = HANG_S
) -> tuple[list[ElementTree.Element], str]:
    """Run tests of a copy until the first failure. Returns its test cases and what it printed."""
    process = FORKED.Process(target=_pytest, args=(folder, list(tests)))
    process.start()
    process.join(patience_s)
    if process.is_alive():
        process.kill()
        return [], f"it took longer than {patience_s} s"
    report, output = folder / REPORT, folder / OUTPUT
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    return cases, output.read_text() if output.exists() else "it did not start"


def _pytest(folder: Path, tests: list[str]) -> None:
    """Run in a process of its own."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))  # before the package that pip installed
    os.environ |= {"PYTHONPATH": str(folder), "PYTEST_ADDOPTS": ""}
    with open(OUTPUT, "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    options = ["-x", "-q", "-p", "no:cacheprovider", f"--junitxml={REPORT}"]
    sys.exit(pytest.main([*options, *(f"tests/{test}" for test in tests)]))


def check_unmutated(defects: Iterable[Defect]) -> None:
    """Raise RuntimeError unless all tests that the defects name pass in a copy without any."""
    tests = sorted({defect.test for defect in defects})
    with copied() as folder:
        cases, output = run_tests(folder, tests, patience_s=10 * HANG_S)  # hundreds of them
    if not cases or any(len(case) for case in cases):  # a failure, an error or a skip
        raise RuntimeError(f"without a defect these tests must pass:\n{output}")


def try_out(defect: Defect) -> Outcome:
    """Run the defect's test on the defect, and see whether it failed as a test should."""
    begun = time.monotonic()
    with copied() as folder:
        imported = folder / "imported"  # the file's last line makes it: this copy was in use
        code = f"{mutated(defect, folder)}\nopen({str(imported)!r}, 'w').close()\n"
        (folder / defect.file).write_text(code)
        cases, output = run_tests(folder, [defect.test])
        killed, reason = _judge(defect, cases, output, imported.exists())
    return Outcome(killed, reason, time.monotonic() - begun)


def _judge(
    defect: Defect, cases: list[ElementTree.Element], output: str, was_imported: bool
) -> tuple[bool, str]:
    failures = [failure for case in cases for failure in case.iter("failure")]
    if not cases or any(case.find("error") is not None for case in cases) or not was_imported:
        return False, f"{defect.test} could not be run on {defect.file}:\n{output}"
    if not failures:
        return False, f"{defect.test} passes"
    message = failures[0].get("message", "")
    expected = (defect.error,) if defect.error else BY_ASSERTION
    if not message.startswith(expected):
        return False, f"{defect.test} failed by {message!r}, not by {' | '.join(expected)}"
    return True, " ".join(message.split())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="name", help="of a defect; all of them")
    parser.add_argument("--jobs", type=int, default=1, help="defects tried out at a time")
    arguments = parser.parse_args()
    known = {defect.name: defect for defect in DEFECTS}
    if unknown := set(arguments.names) - set(known):
        parser.error(f"no defect {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    chosen = [known[name] for name in arguments.names or known]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for defect in chosen:
        mutated(defect)
    begun = time.monotonic()
    check_unmutated(chosen)
    width, num_killed = max(len(name) for name in known), 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        outcomes = tqdm(pool.map(try_out, chosen), total=len(chosen), desc="defects")
        for defect, outcome in zip(chosen, outcomes, strict=True):
            found = f"killed by {defect.test}" if outcome.killed else f"SURVIVED: {outcome.reason}"
            tqdm.write(f"{defect.name:{width}}  {outcome.seconds:4.0f} s  {found}")
            num_killed += outcome.killed
    print(f"{num_killed} of {len(chosen)} killed in {time.monotonic() - begun:.0f} s")
    return 0 if num_killed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
