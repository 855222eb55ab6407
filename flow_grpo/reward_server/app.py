"""The HTTP side: who may ask, for how much at once, and what becomes of a request twice sent."""

from __future__ import annotations

import asyncio
import hmac
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flow_grpo.reward_server.batcher import Batcher, Unscorable
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.remote import wire

NUM_REMEMBERED = 4096  # answers, for retries of requests that were already scored
RETRY_AFTER_S = 1
NUM_DECODERS = 2  # threads
MAX_KEY = 128  # characters of an idempotency key
STUCK = "a call of the scorer takes longer than a request may: it is stuck"


@dataclass(frozen=True)
class Limits:
    """What a server takes; beyond it a request is refused with 413, or with 429 for now."""

    body_bytes: int = 2**28
    queue_bytes: int = 2**30  # of all requests that are being read, wait or are scored
    pixels: int = 2**27  # of all images of a request
    items: int = 4096  # images of a request
    queue: int = 256  # requests
    timeout_s: float = 600.0  # of a request, and of one call of the scorer


class Service:
    """The state behind the routes; only the event loop's thread touches it."""

    def __init__(self, reward: str, batcher: Batcher, limits: Limits, compares: bool):
        self.reward, self.batcher, self.limits = reward, batcher, limits
        self.compares = compares  # the images of a group, so that a request needs whole groups
        self.num_bytes = self.num_requests = 0  # taken in and not yet answered
        self.statuses: Counter[int] = Counter()
        self._jobs: OrderedDict[str, Future] = OrderedDict()  # by idempotency key
        self.decoders = ThreadPoolExecutor(NUM_DECODERS, thread_name_prefix="decode")

    async def health(self) -> JSONResponse:
        """Say which reward this is, and whether it still scores: 503 once a call is stuck."""
        state = {"reward": self.reward, "compares": self.compares, "waiting": self.num_requests}
        if self._stuck():
            return JSONResponse(state | {"detail": STUCK}, 503)
        return JSONResponse(state)

    async def metrics(self) -> PlainTextResponse:
        """Count, in Prometheus' text format."""
        batcher = self.batcher
        lines = [
            f'reward_requests_total{{status="{status}"}} {count}'
            for status, count in sorted(self.statuses.items())
        ]
        lines += [
            f"reward_pictures_total {batcher.num_scored}",
            f"reward_picture_errors_total {batcher.num_row_errors}",
            f"reward_calls_total {batcher.num_calls}",
            f"reward_call_seconds_total {batcher.seconds:.6f}",
            f"reward_waiting_requests {self.num_requests}",
            f"reward_waiting_bytes {self.num_bytes}",
        ]
        return PlainTextResponse("\n".join(lines) + "\n")

    async def score(self, request: Request) -> JSONResponse:
        """Score images; flow_grpo/rewards/remote/wire.py describes body and answer."""
        taken = self._admit(request)
        self.num_requests += 1
        self.num_bytes += taken
        try:
            key = request.headers.get("idempotency-key")
            body = await asyncio.wait_for(request.body(), self.limits.timeout_s)
            batch = await self._decode(body)
            del body
            self.num_bytes += (decoded := batch.num_bytes()) - taken
            taken = decoded
            job = self._jobs.get(key)
            scored = job is not None and job.done()
            if not scored and self.num_bytes > max(self.limits.queue_bytes, taken):
                raise _busy("its images do not fit beside those that wait")
            job = job or self._submit(key, batch)
            waiting = asyncio.shield(asyncio.wrap_future(job))
            return JSONResponse(await asyncio.wait_for(waiting, self.limits.timeout_s))
        except TimeoutError:
            raise HTTPException(504, f"no scores within {self.limits.timeout_s:g} s") from None
        except Unscorable as error:
            raise HTTPException(422, str(error)) from None
        except HTTPException:
            raise
        except Exception as error:
            raise HTTPException(500, f"{type(error).__name__}: {error}"[:500]) from None
        finally:
            self.num_requests -= 1
            self.num_bytes -= taken

    def _stuck(self) -> bool:
        return self.batcher.busy_s() > self.limits.timeout_s

    def _admit(self, request: Request) -> int:
        """Return how many bytes a request has, or refuse it before they are read."""
        limits = self.limits
        if request.headers.get("content-type") != wire.CONTENT_TYPE:
            raise HTTPException(415, f"content-type {wire.CONTENT_TYPE} is needed")
        if len(request.headers.get("idempotency-key", "")) > MAX_KEY:
            raise HTTPException(400, f"an idempotency-key has at most {MAX_KEY} characters")
        length = request.headers.get("content-length", "")
        if not length.isdecimal():
            raise HTTPException(411, "content-length is needed")
        if int(length) > limits.body_bytes:
            raise HTTPException(
                413, f"the body has {length} bytes, at most {limits.body_bytes} are allowed"
            )
        if self._stuck():
            raise HTTPException(503, STUCK)
        if self.num_requests >= limits.queue:
            raise _busy(f"{self.num_requests} requests wait")
        if self.num_bytes + int(length) > limits.queue_bytes:
            raise _busy(f"{self.num_bytes} bytes wait")
        return int(length)

    async def _decode(self, body: bytes) -> Batch:
        limits, loop = self.limits, asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(
                self.decoders, wire.decode, body, limits.items, limits.pixels
            )
        except wire.Malformed as error:
            raise HTTPException(400, str(error)) from None
        except wire.TooLarge as error:
            raise HTTPException(413, str(error)) from None

    def _submit(self, key: str | None, batch: Batch) -> Future:
        """Queue a request, and remember its answer for those who ask for it again."""
        job, loop = self.batcher.submit(batch), asyncio.get_running_loop()
        if key:
            self._jobs[key] = job
            job.add_done_callback(lambda _: loop.call_soon_threadsafe(self._forget, key, job))
        return job

    def _forget(self, key: str, job: Future) -> None:
        """Drop what failed, and may be tried anew, or the oldest where there are too many."""
        if job.exception():
            self._jobs.pop(key, None)
        elif len(self._jobs) > NUM_REMEMBERED:
            self._jobs.popitem(last=False)


def counted(app: ASGIApp, statuses: Counter[int]) -> ASGIApp:
    """Count the answers by status. FastAPI's own kind of middleware would copy every body."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses[message["status"]] += 1
            await send(message)

        await app(scope, receive, counting)

    return serve


def create_app(
    reward: str, batcher: Batcher, limits: Limits, token: str = "", compares: bool = False
) -> FastAPI:
    """Return the application. token: what a request must bring; "": none. compares: groups."""
    service = Service(reward, batcher, limits, compares)

    async def authorise(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(None, batcher.close, limits.timeout_s)
        service.decoders.shutdown(wait=False)

    # The pages /docs and /redoc would load scripts from elsewhere.
    app = FastAPI(
        title=f"Reward server: {reward}",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        dependencies=[Depends(authorise)],
    )
    file = {"schema": {"type": "string", "format": "binary"}}
    body = {"content": {wire.CONTENT_TYPE: file}, "required": True}
    app.get("/health")(service.health)
    app.get("/metrics")(service.metrics)
    app.post("/score", openapi_extra={"requestBody": body})(service.score)

    app.add_middleware(counted, statuses=service.statuses)
    return app


def _busy(why: str) -> HTTPException:
    return HTTPException(429, f"too much at once: {why}", {"Retry-After": str(RETRY_AFTER_S)})
