"""Reward servers of this process for tests: the real one in a thread, and a faulty one."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import uvicorn
from PIL import Image
from safetensors.numpy import save
from waiting import HANG_S

from flow_grpo.reward_server import connections
from flow_grpo.reward_server.app import Limits, create_app
from flow_grpo.reward_server.batcher import Batcher
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.remote import wire
from flow_grpo.rewards.remote.client import RemoteReward
from flow_grpo.rewards.remote.servers import Servers

ROOT = Path(__file__).parent.parent
HTTP = httpx.Client(verify=False, timeout=HANG_S)  # one: each loads certificates, a slow thing


class Clock:
    """Time that passes while someone sleeps, and when a test says so."""

    def __init__(self):
        self.now, self.slept = 1000.0, []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


class Running:
    """A server that runs, and what it scored."""

    def __init__(self, url: str, batcher: Batcher):
        self.url, self.batcher = url, batcher


@contextmanager
def serve(
    score: Callable,
    *,
    name="mean",
    token="",
    max_rows=64,
    compares=False,
    clock=time.monotonic,
    idle_s=HANG_S,
    most=4096,
    **limits,
) -> Iterator[Running]:
    """Serve a function of a Batch; idle_s, most: of its connections; limits: of Limits."""
    batcher = Batcher(score, max_rows, linger_s=0.005, clock=clock)
    app = create_app(name, batcher, replace(Limits(), **limits), token, compares)
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    config = connections.config(app, idle_s, most, log_level="error", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", batcher)
    finally:
        server.should_exit = True
        thread.join(HANG_S)
        listener.close()


@contextmanager
def faulty(answer: Callable[[BaseHTTPRequestHandler, int], None]) -> Iterator[tuple[str, list]]:
    """Serve answer(handler, number of the request). Yields the URL and the requests' headers."""
    seen: list = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            seen.append(dict(self.headers))
            answer(self, len(seen))

        def do_GET(self):
            seen.append("health")
            answer(self, len(seen))

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


def reply(handler: BaseHTTPRequestHandler, status: int, body, **headers) -> None:
    """Answer with JSON, or with bytes as they are."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for key, value in headers.items():
        handler.send_header(key.replace("_", "-"), str(value))
    handler.send_header("content-length", str(len(raw)))
    handler.end_headers()
    handler.wfile.write(raw)


@contextmanager
def client(
    *urls: str, name="mean", timeout_s=HANG_S, clock: Clock | None = None, **more
) -> Iterator[RemoteReward]:
    time = (clock, clock.sleep) if clock else ()
    reward = RemoteReward(name, Servers({name: list(urls)}, timeout_s, **more), *time)
    try:
        yield reward
    finally:
        reward.close()


def wait_for_requests(server: Running, count: int) -> None:
    """Wait until so many requests are with a server."""
    wait_until(lambda: HTTP.get(f"{server.url}/health").json()["waiting"] >= count)


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for something to become true, whatever time it takes."""
    deadline = time.monotonic() + HANG_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def mean(batch) -> dict[str, np.ndarray]:
    """A score that tells which image it was computed from."""
    return {"mean": np.array([float(image.mean()) for image in batch.images])}


def pictures(count: int, side: int = 8, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return list(rng.integers(0, 256, (count, side, side + 1, 3), dtype=np.uint8))


def rows(images: list[np.ndarray], **more) -> Batch:
    """Images without prompts, or with what is given."""
    blank = {"prompts": [""] * len(images), "metadata": [{}] * len(images)}
    return Batch(images, **(blank | more))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def start(name: str, port: int, *more: str) -> subprocess.Popen:
    """Serve in a process of its own, and wait until it does."""
    command = [sys.executable, "-m", "flow_grpo.reward_server", "--reward", name, "--port"]
    process = subprocess.Popen(
        [*command, str(port), *more], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )

    def answers() -> bool:
        assert process.poll() is None, process.communicate()
        try:
            return HTTP.get(f"http://127.0.0.1:{port}/health").status_code == 200
        except httpx.TransportError:
            return False

    wait_until(answers)
    return process


@contextmanager
def started(name: str, *more: str) -> Iterator[str]:
    """Yield the URL of a process that serves a reward, and end it: at SIGTERM it leaves with 0."""
    server = start(name, port := free_port(), *more)
    try:
        yield f"http://127.0.0.1:{port}"
        server.send_signal(signal.SIGTERM)
        assert server.wait(HANG_S) == 0
    finally:
        server.kill()


class Gate:
    """A scorer that waits until it may go on."""

    def __init__(self):
        self.calls, self.go = [], threading.Event()

    def __call__(self, batch):
        self.calls.append(len(batch))
        assert self.go.wait(HANG_S)
        return mean(batch)


def picky(batch) -> dict[str, np.ndarray]:
    """Refuses a row whose metadata has no "n"."""
    return {"mean": np.array([float(row["n"]) for row in batch.metadata])}


def file(side: int, kind: str = "JPEG", mode: str = "RGB") -> np.ndarray:
    """A black image's file as a tensor."""
    written = BytesIO()
    Image.new(mode, (side, side)).save(written, kind)
    return np.frombuffer(written.getvalue(), np.uint8)


def post(url: str, body: bytes, kind: str = wire.CONTENT_TYPE, **headers) -> httpx.Response:
    return HTTP.post(f"{url}/score", content=body, headers={"content-type": kind} | headers)


def exact(rows: object, tensors: dict | None = None) -> bytes:
    text = rows if isinstance(rows, str) else json.dumps(rows)
    given = {"image/0": np.zeros((2, 2, 3), np.uint8)} if tensors is None else tensors
    return save(given, metadata={"rows": text})


ONE = {"prompts": [""], "metadata": [{}], "group": None}
