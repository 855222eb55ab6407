"""What the fuzzers share: numbered cases that can be repeated alone, a guard, a table's row.

A fuzzer is a function of a random.Random that makes a case, tries it, and returns REFUSED (by the
promised ValueError) or EQUAL (read, to what an independent reader finds). All else it raises.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from waiting import HANG_S

REFUSED, EQUAL = "refused", "equal"
HEAD = "| fuzzer | cases | refused | read and equal | anything else | seconds | peak memory |"
Fuzzer = Callable[[random.Random], str]


class Hangs(BaseException):
    """A case waits for what never comes. No Exception, which readers of pictures catch."""


@contextmanager
def guarded(seconds: int = HANG_S) -> Iterator[None]:
    """Raise Hangs in what takes longer."""

    def stop(*_) -> None:
        raise Hangs(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def rng(seed: int, number: int) -> random.Random:
    """Return what decides about a case, whichever were tried before it."""
    return random.Random(f"{seed}/{number}")


def sweep(fuzzer: Fuzzer, count: int, seed: int, first: int = 0) -> tuple[Counter, list[str]]:
    """Try cases; count what came of them, and tell of each that was neither refused nor equal."""
    seen, wrong = Counter(), []
    for number in range(first, first + count):
        draw = rng(seed, number)
        draw.number = number
        try:
            with guarded():
                came = fuzzer(draw)
            assert came in (REFUSED, EQUAL), came
        except (Exception, Hangs) as error:
            came = "anything else"
            said = "".join(traceback.format_exception(error, limit=-4))
            wrong.append(f"--first {number} --count 1 --seed {seed}: {said:.3000}")
        seen[came] += 1
    return seen, wrong


def main(name: str, make: Callable[[Path], Fuzzer], argv: list[str]) -> int:
    """Run a fuzzer by hand and print its row. make: gets an empty folder for its files."""
    parser = argparse.ArgumentParser(description=f"Fuzz {name}; prints a row of a Markdown table.")
    parser.add_argument("--count", type=int, default=1000, help="of cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    args = parser.parse_args(argv[1:])
    import tempfile

    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        started = time.monotonic()
        seen, wrong = sweep(make(Path(folder)), args.count, args.seed, args.first)
        seconds = time.monotonic() - started
    for each in wrong:
        print(each, file=sys.stderr)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    counts = [f"{seen[kind]:,}" for kind in (REFUSED, EQUAL, "anything else")]
    cells = [name, f"{args.count:,}", *counts, f"{seconds:,.0f}", f"{peak:,.0f} MiB"]
    print(f"| {' | '.join(cells)} |", flush=True)
    return int(bool(wrong))


class Payload:
    """Unpickled, it makes a folder; whoever finds that has executed a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def flipped(data: bytes, draw: random.Random, most: int = 4) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, most) if changed else 0):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def other_than_a_file(path: Path, draw: random.Random) -> None:
    """Put a folder, pipe, socket or link that leads to no file in a file's place."""
    import socket

    path.unlink(missing_ok=True)
    kind = draw.choice(("folder", "pipe", "socket", "nowhere", "loop", "/dev/zero", "/dev/full"))
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path must be short
        try:
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(path.name)
        finally:
            os.chdir(here)
    else:
        path.symlink_to({"nowhere": "not/there", "loop": path.name}.get(kind, kind))
