"""How many images a second travel to a reward server and back as scores, beside a bare pickle.

    python scripts/benchmark/reward_server.py [--pictures 64] [--calls 30] [--side 512]

The server is a process of its own on loopback, its reward the mean of a corner of the image, so
that only the transport is timed. The yardstick sends the same call as one pickle over a socket to a
thread-per-connection process that unpickles and answers in kind: no HTTP, no checks, no limits. It
reads nothing but what this script has written, and pickle is nowhere else in this project.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.remote import health
from flow_grpo.rewards.remote.client import RemoteReward
from flow_grpo.rewards.remote.servers import Servers

ROOT = Path(__file__).parent.parent.parent
NAME = "scripts.benchmark.reward_server:corner"
Call = Callable[[Batch], np.ndarray]


def corner(batch: Batch) -> np.ndarray:
    """Score by the mean of 8 x 8 pixels: nothing, beside the transport."""
    return np.array([float(image[:8, :8].mean()) for image in batch.images])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=64, help="of a call")
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument("--side", type=int, default=512, help="pixels")
    args = parser.parse_args(argv)
    # Smooth images with some noise: neither the best nor the worst case of a compressor.
    rng = np.random.default_rng(0)
    images = [picture(rng, args.side) for _ in range(args.pictures)]
    print(f"{args.pictures} images of {args.side} x {args.side} a call, {args.calls} calls")
    print("| transport | images/s | MB/s | p50 ms a call | p99 ms a call |\n|---|---|---|---|---|")
    with_pickle(images, args.calls)
    for encoding in ("raw", "jpeg"):
        with_server(images, args.calls, encoding)


def picture(rng: np.random.Generator, side: int) -> np.ndarray:
    coarse = rng.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8)
    fine = np.kron(coarse, np.ones((16, 16, 1), np.uint8)).astype(np.int16)
    return (fine + rng.integers(-4, 5, fine.shape)).clip(0, 255).astype(np.uint8)


def measure(name: str, call: Call, images: list[np.ndarray], num_calls: int) -> None:
    """Time whole calls and print a row of the table."""
    batch = Batch(images, ["a prompt"] * len(images), [{"tag": "t"}] * len(images))
    truth = corner(batch)
    seconds = []
    for number in range(num_calls + 2):
        start = time.perf_counter()
        found = call(batch)
        if number >= 2:  # the first ones open connections
            seconds.append(time.perf_counter() - start)
        assert "jpeg" in name or np.array_equal(found, truth)
    total, megabytes = sum(seconds), sum(image.nbytes for image in images) * num_calls / 1e6
    middle, last = np.quantile(seconds, [0.5, 0.99]) * 1000
    rate = len(images) * num_calls / total
    print(
        f"| {name} | {rate:.0f} | {megabytes / total:.0f} | {middle:.0f} | {last:.0f} |", flush=True
    )


def with_server(images: list[np.ndarray], num_calls: int, encoding: str) -> None:
    """Measure the project's own server and client."""
    port = free_port()
    command = [sys.executable, "-m", "flow_grpo.reward_server", "--reward", NAME, "--port"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*command, str(port)], cwd=ROOT, env=environment)
    servers = Servers({NAME: [f"http://127.0.0.1:{port}"]}, encoding=encoding)
    while any(answer.problem for answer in health.ask(servers, [NAME]).values()):
        assert process.poll() is None
        time.sleep(0.2)
    reward = RemoteReward(NAME, servers)
    measure(f"HTTP, {encoding}", lambda batch: reward(batch)[NAME], images, num_calls)
    reward.close()
    process.send_signal(signal.SIGTERM)
    process.wait()


def with_pickle(images: list[np.ndarray], num_calls: int) -> None:
    """Measure one pickle there and one back on a connection that stays open."""
    listener = socket.create_server(("127.0.0.1", 0))
    process = multiprocessing.get_context("fork").Process(target=answer, args=(listener,))
    process.start()
    with socket.create_connection(listener.getsockname()) as peer:

        def call(batch: Batch) -> np.ndarray:
            send(peer, batch)
            return receive(peer)

        measure("bare pickle", call, images, num_calls)
    process.join()


def answer(listener: socket.socket) -> None:
    peer, _ = listener.accept()
    with peer:
        while (batch := receive(peer)) is not None:
            send(peer, corner(batch))


def send(peer: socket.socket, value: object) -> None:
    body = pickle.dumps(value, protocol=5)
    peer.sendall(struct.pack("<Q", len(body)) + body)


def receive(peer: socket.socket) -> object:
    """Return the next value; None at the end."""
    head = peer.recv(8, socket.MSG_WAITALL)
    if len(head) < 8:
        return None
    body = bytearray(struct.unpack("<Q", head)[0])
    view = memoryview(body)
    while view:
        view = view[peer.recv_into(view) :]
    return pickle.loads(body)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


if __name__ == "__main__":
    main(sys.argv[1:])
