"""Connections that end: uvicorn waits for a request's head for as long as its peer likes."""

from __future__ import annotations

import asyncio
import math
import resource
from collections import OrderedDict

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

SPARE_FILES = 64  # of the process, for other things than connections


def config(
    app: ASGIApp, idle_s: float = 60.0, most: int = 4096, **settings: object
) -> uvicorn.Config:
    """Configure uvicorn with connections that end.

    idle_s: seconds in which a connection must bring a whole head, from its start or from the answer
    before it, and take 64 KiB of an answer. most: connections at a time; where there are more, the
    one that has been without a request for longest ends.
    """
    return uvicorn.Config(
        app,
        http=_protocol(idle_s, most),
        ws="none",
        timeout_keep_alive=math.ceil(idle_s),
        proxy_headers=False,
        **settings,
    )


def room_for(wanted: int) -> int:
    """Return for how many connections the process may open files; it takes what it is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed, endless = wanted + SPARE_FILES, resource.RLIM_INFINITY
    if soft != endless and soft < needed:
        soft = needed if hard == endless else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == endless else max(1, min(wanted, soft - SPARE_FILES))


def _protocol(idle_s: float, most: int) -> type[H11Protocol]:
    idle: OrderedDict[H11Protocol, asyncio.TimerHandle] = OrderedDict()  # the oldest first

    class Connection(H11Protocol):
        slow: asyncio.TimerHandle | None = None  # runs while its peer does not read

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                oldest = next(iter(idle), self)
                oldest.wake()
                oldest.transport.abort()
            self.wait()

        def wait(self) -> None:
            self.wake()
            timer = self.loop.call_later(idle_s, self.transport.abort)
            if not self.transport.is_closing():
                idle[self] = timer

        def wake(self) -> None:
            if timer := idle.pop(self, None):
                timer.cancel()

        def handle_events(self) -> None:
            before = self.cycle
            try:
                super().handle_events()
            except h11.LocalProtocolError:  # uvicorn has no answer to it
                self.transport.abort()
            if self.cycle is not before:
                self.wake()

        def send_400_response(self, message: str) -> None:
            if self.cycle and not self.cycle.response_complete:  # it hears of no body any more
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            super().send_400_response(message)

        def on_response_complete(self) -> None:
            self.wait()
            super().on_response_complete()

        def connection_lost(self, error: Exception | None) -> None:
            self.wake()
            self.resume_writing()
            super().connection_lost(error)

        def pause_writing(self) -> None:
            super().pause_writing()
            self.slow = self.slow or self.loop.call_later(idle_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self.slow:
                self.slow.cancel()
                self.slow = None

    return Connection
