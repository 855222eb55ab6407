"""A reward server's process for the fuzzer: raw bytes in, what comes back, and what it holds."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import serving
from hostile_http import HEAD, TOKEN
from hostile_requests import Case
from serving import HANG_S

ROOT = Path(__file__).parents[1]
NAME = "hostile_requests:mean"
LOST = b""  # instead of an answer
HOT = {"timeout": 30, "body-timeout": 1, "idle-timeout": 5}


def lengths(head: bytes) -> list[int]:
    lines = head.lower().split(b"\r\n")
    return [int(line[15:]) for line in lines if line.startswith(b"content-length:")]


def pieces(raw: bytes, size: int) -> list[bytes]:
    return [raw[start : start + size] for start in range(0, len(raw), size)]


class Server:
    """A reward server's process, and what it says of itself."""

    def __init__(self, process: subprocess.Popen, port: int):
        self.process, self.port, self.held = process, port, []

    def ask(self, raw: bytes, then: str = "") -> bytes:
        """Send bytes; return the answer, or LOST. then: see Case."""
        peer = socket.create_connection(("127.0.0.1", self.port), timeout=HANG_S)
        with suppress(OSError):
            for piece in pieces(raw, 997 if then == "dribbles" else 2**20):
                peer.sendall(piece)
        if then == "waits":
            self.held = [*self.held[-100:], peer]
            return LOST
        with peer, suppress(OSError):
            if then == "leaves":
                peer.shutdown(socket.SHUT_WR)
            found = b""
            while more := peer.recv(65536):
                found += more
                head, end, body = found.partition(b"\r\n\r\n")
                if end and lengths(head) and len(body) >= lengths(head)[0]:
                    break
            return found
        return LOST

    def send(self, case: Case) -> tuple[int, bytes]:
        """Return status, 0 if there was none, and body."""
        if (raw := case.raw) is None:
            head = dict(line.split(": ") for line in HEAD) | {"connection": "close"}
            head |= {"content-length": str(len(case.body))} | case.headers
            lines = ["POST /score HTTP/1.1", *(f"{k}: {v}" for k, v in head.items()), "", ""]
            raw = "\r\n".join(lines).encode() + case.body
        found = self.ask(raw, case.then)
        while found.startswith(b"HTTP/1.1 100 "):
            found = found.partition(b"\r\n\r\n")[2]
        head, _, body = found.partition(b"\r\n\r\n")
        return (int(head.split()[1]), body) if head.startswith(b"HTTP/") else (0, body)

    def metrics(self) -> dict[str, float]:
        lines = ["GET /metrics HTTP/1.1", *HEAD, "connection: close", "", ""]
        text = self.ask("\r\n".join(lines).encode()).partition(b"\r\n\r\n")[2].decode()
        rows = (line.rsplit(" ", 1) for line in text.splitlines())
        return {name: float(value) for name, value in rows}

    def mib(self, key: str) -> float:
        """VmHWM, the peak, or VmRSS, of now."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

    def rests(self) -> bool:
        found = self.metrics()
        return found["reward_waiting_requests"] == found["reward_waiting_bytes"] == 0


@contextmanager
def server(**options: float) -> Iterator[Server]:
    """Serve `hostile_requests:mean` with a token."""
    port, flags = serving.free_port(), [f"--{k}={v}" for k, v in (HOT | options).items()]
    command = [sys.executable, "-m", "flow_grpo.reward_server", "--reward", NAME, f"--port={port}"]
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with tempfile.NamedTemporaryFile("w") as token, tempfile.TemporaryFile("w+") as said:
        print(TOKEN, file=token, flush=True)
        process = subprocess.Popen(
            [*command, *flags, f"--token-file={token.name}"],
            cwd=ROOT,
            env=os.environ | paths,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
        try:
            assert "is served at" in process.stdout.readline()
            yield Server(process, port)
            process.send_signal(signal.SIGTERM)
            assert process.wait(HANG_S) == 0
            said.seek(0)
            assert "Traceback" not in (text := said.read()), text
        finally:
            process.kill()
            process.stdout.close()
