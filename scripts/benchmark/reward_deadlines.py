"""How late a reward's deadlines are: a call to servers that are dead, silent or drip, and a start.

    python scripts/benchmark/reward_deadlines.py [--timeout 3]

Each line names what the server does and how long the client took over it.
"""

from __future__ import annotations

import argparse
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.remote import health
from flow_grpo.rewards.remote.client import RemoteReward
from flow_grpo.rewards.remote.servers import Servers

DRIPS = {
    "is silent": b"",
    "drips in the head": b"HTTP/1.1 200 OK\r\nx: ",
    "drips in the body": b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n",
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--timeout", type=float, default=3.0, help="config.reward_timeout, seconds")
    timeout_s = parser.parse_args(argv).timeout
    print("| the server | allowed s | a call s | the next call ms | allowed s | a start s |")
    print("|---|---|---|---|---|---|")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dead = f"http://127.0.0.1:{listener.getsockname()[1]}"
    measure("is not there", dead, timeout_s)
    for says, first in DRIPS.items():
        with dripping(first) as url:
            measure(says, url, timeout_s)


def measure(says: str, url: str, timeout_s: float) -> None:
    """Print a row of the table."""
    servers = Servers({"any": [url]}, timeout_s)
    reward, batch = RemoteReward("any", servers), Batch([np.zeros((8, 8, 3), np.uint8)], [""], [{}])
    call, again = (seconds(lambda: reward(batch)) for _ in range(2))
    reward.close()
    start = seconds(lambda: health.check(servers))
    print(
        f"| {says} | {timeout_s:g} | {call:.2f} | {again * 1000:.1f} | {health.HEALTH_S:g} | "
        f"{start:.2f} |"
    )


def seconds(call: Callable[[], object]) -> float:
    """Time a call that must fail."""
    start = time.perf_counter()
    try:
        call()
    except (RuntimeError, ValueError):
        return time.perf_counter() - start
    raise AssertionError("it did not fail")


@contextmanager
def dripping(first: bytes) -> Iterator[str]:
    """Serve something and then, ten times a second, a byte."""
    listener, ended = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def drip(peer: socket.socket) -> None:
        with peer:
            try:
                peer.sendall(first)
                while not ended.wait(0.1):
                    peer.sendall(b"1" if first else b"")
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=drip, args=(peer,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        ended.set()
        listener.close()


if __name__ == "__main__":
    main(sys.argv[1:])
