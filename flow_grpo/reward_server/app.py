"""The HTTP side: who may ask, for how much at once, and what becomes of a request twice sent."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flow_grpo.cli import redacted
from flow_grpo.reward_server.batcher import Batcher, Unscorable
from flow_grpo.reward_server.ledger import Full, Ledger, Place
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.remote import wire

NUM_REMEMBERED = 4096  # answers, for retries of requests that were already scored
REMEMBERED_BYTES = 2**26  # of them all
RETRY_AFTER_S = 1
NUM_DECODERS = 2  # threads
MAX_KEY = 128  # characters of an idempotency key
BODY_BYTES_S = 2**18  # a body that comes faster than this is waited for beyond Limits.body_s
UNAUTHORISED = {"WWW-Authenticate": "Bearer"}
STUCK = "a call of the scorer takes longer than a request may: it is stuck"

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What a server takes; beyond it a request is refused with 413, or with 429 for now."""

    body_bytes: int = 2**28
    queue_bytes: int = 2**30  # of all requests that are being read, wait or are scored
    pixels: int = 2**27  # of all images of a request
    items: int = 4096  # images of a request
    queue: int = 256  # requests that were read
    timeout_s: float = 600.0  # of a request, and of one call of the scorer
    values: int = wire.MAX_VALUES  # of a request's JSON
    body_s: float = 30.0  # for a body, and longer at BODY_BYTES_S


class Service:
    """The state behind the routes; only the event loop's thread touches it, but for the ledger."""

    def __init__(self, reward: str, batcher: Batcher, limits: Limits, compares: bool):
        self.reward, self.batcher, self.limits = reward, batcher, limits
        self.compares = compares  # the images of a group, so that a request needs whole groups
        self.ledger = Ledger(limits.queue_bytes)
        self.num_requests = 0  # read and not yet answered
        self.num_jobs = 0  # with the batcher, whether or not someone still waits
        self.statuses: Counter[int] = Counter()
        # By idempotency key: a digest of the body, and what became of it.
        self._running: dict[str, tuple[bytes, Future]] = {}
        self._answers: OrderedDict[str, tuple[bytes, bytes]] = OrderedDict()
        self._answers_bytes = 0
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
            f"reward_waiting_bytes {self.ledger.total}",
            f"reward_remembered_answers {len(self._answers)}",
            f"reward_remembered_bytes {self._answers_bytes}",
        ]
        return PlainTextResponse("\n".join(lines) + "\n")

    async def score(self, request: Request) -> Response:
        """Score images; flow_grpo/rewards/remote/wire.py describes body and answer."""
        length, place = self._admit(request), Place(self.ledger)
        try:
            key = request.headers.get("idempotency-key")
            answer = await self._answer(key, await self._read(request, length, place), place)
            return Response(answer, media_type="application/json")
        except Full as error:
            raise _busy(f"{error}, and it does not fit beside them") from None
        except TimeoutError:
            raise HTTPException(504, f"no scores within {self.limits.timeout_s:g} s") from None
        except Unscorable as error:
            raise HTTPException(422, str(error)) from None
        except HTTPException:
            raise
        except Exception as error:
            said = redacted(f"{type(error).__name__}: {error}")[: wire.MAX_ERROR]
            raise HTTPException(500, said) from None
        finally:
            place.release()

    def _stuck(self) -> bool:
        return self.batcher.busy_s() > self.limits.timeout_s

    def _admit(self, request: Request) -> int:
        """Return how many bytes a request announces, or refuse it before they are read."""
        limits = self.limits
        if request.headers.get("content-type") != wire.CONTENT_TYPE:
            raise HTTPException(415, f"content-type {wire.CONTENT_TYPE} is needed")
        if len(request.headers.get("idempotency-key", "")) > MAX_KEY:
            raise HTTPException(400, f"an idempotency-key has at most {MAX_KEY} characters")
        length = request.headers.get("content-length", "")
        if not length.isdecimal() or "transfer-encoding" in request.headers:
            raise HTTPException(411, "content-length is needed, and no transfer-encoding")
        if int(length) > limits.body_bytes:
            raise HTTPException(
                413, f"the body has {length} bytes, at most {limits.body_bytes} are allowed"
            )
        self._make_room()
        if self.ledger.total + int(length) > limits.queue_bytes:
            raise _busy(f"{self.ledger.total} bytes wait")
        return int(length)

    def _make_room(self) -> None:
        """Refuse a request where too many wait."""
        if self._stuck():
            raise HTTPException(503, STUCK)
        waiting = max(self.num_requests, self.num_jobs)
        if waiting >= self.limits.queue:
            raise _busy(f"{waiting} requests wait")

    async def _read(self, request: Request, length: int, place: Place) -> bytearray:
        """Take a body in; what counts is what has come, not what was announced."""
        limits, loop, body = self.limits, asyncio.get_running_loop(), bytearray()
        start = loop.time()
        try:
            async with asyncio.timeout(limits.body_s) as patience:
                async for chunk in request.stream():
                    place.hold(len(chunk))
                    body += chunk
                    allowed_s = limits.body_s + len(body) / BODY_BYTES_S
                    patience.reschedule(start + min(allowed_s, limits.timeout_s))
        except TimeoutError:
            raise HTTPException(
                408, f"{len(body)} of {length} bytes came in time", {"connection": "close"}
            ) from None
        except ClientDisconnect:
            raise HTTPException(400, "the connection ended") from None
        return body

    async def _answer(self, key: str | None, body: bytearray, place: Place) -> bytes:
        """Score a body, unless that was done or begun under its key."""
        self._make_room()
        self.num_requests += 1
        try:
            digest = await self._off_loop(partial(_digest, body)) if key else b""
            job = self._known(key, digest)
            if job is None:
                batch = await self._decode(body, place)
                # Another request may have come with the key meanwhile.
                job = self._known(key, digest) or self._submit(key, digest, batch, place)
                del batch
            del body
            place.release()
            if isinstance(job, bytes):
                return job
            waiting = asyncio.shield(asyncio.wrap_future(job))
            return await asyncio.wait_for(waiting, self.limits.timeout_s)
        finally:
            self.num_requests -= 1

    async def _off_loop(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.decoders, work)

    async def _decode(self, body: bytearray, place: Place) -> Batch:
        limits = self.limits
        try:
            return await self._off_loop(
                lambda: wire.decode(body, limits.items, limits.pixels, limits.values, place.hold)
            )
        except wire.Malformed as error:
            raise HTTPException(400, str(error)) from None
        except wire.TooLarge as error:
            raise HTTPException(413, str(error)) from None

    def _known(self, key: str | None, digest: bytes) -> Future | bytes | None:
        """Return what became of a request under its key; refuse another body under it."""
        if not key:
            return None
        found = self._running.get(key) or self._answers.get(key)
        if found and found[0] != digest:
            raise HTTPException(409, "this idempotency-key came with another body before")
        return found and found[1]

    def _submit(self, key: str | None, digest: bytes, batch: Batch, place: Place) -> Future:
        """Queue a request; what it holds is free once it is scored, whoever still waits."""
        loop, held = asyncio.get_running_loop(), place.hand_over()
        job = self.batcher.submit(batch)
        self.num_jobs += 1
        if key:
            self._running[key] = digest, job

        def done(_: Future) -> None:
            held.release()
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._remember, key, digest, job)

        job.add_done_callback(done)
        return job

    def _remember(self, key: str | None, digest: bytes, job: Future) -> None:
        """Keep an answer for those who ask again. What failed may be tried anew."""
        self.num_jobs -= 1
        if not key:
            return
        del self._running[key]
        if not job.exception():
            self._answers[key] = digest, job.result()
            self._answers_bytes += len(job.result())
        while len(self._answers) > NUM_REMEMBERED or self._answers_bytes > REMEMBERED_BYTES:
            _, (_, oldest) = self._answers.popitem(last=False)
            self._answers_bytes -= len(oldest)


def _digest(body: bytearray) -> bytes:
    return hashlib.sha256(body).digest()


def guarded(app: ASGIApp, statuses: Counter[int], token: str) -> ASGIApp:
    """Ask for the token whatever the route, and count the answers by status.

    FastAPI's own kind of middleware would copy every body.
    """
    wanted = f"Bearer {token}".encode()

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses[message["status"]] += 1
            await send(message)

        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] == "http" and token and not hmac.compare_digest(given, wanted):
            answer = JSONResponse({"detail": "a bearer token is needed"}, 401, UNAUTHORISED)
            await answer(scope, receive, counting)
        else:
            await app(scope, receive, counting)

    return serve


def create_app(
    reward: str, batcher: Batcher, limits: Limits, token: str = "", compares: bool = False
) -> FastAPI:
    """Return the application. token: what a request must bring; "": none. compares: groups."""
    service = Service(reward, batcher, limits, compares)

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
    )
    file = {"schema": {"type": "string", "format": "binary"}}
    body = {"content": {wire.CONTENT_TYPE: file}, "required": True}
    app.get("/health")(service.health)
    app.get("/metrics")(service.metrics)
    app.post("/score", openapi_extra={"requestBody": body})(service.score)

    app.add_middleware(guarded, statuses=service.statuses, token=token)
    return app


def _busy(why: str) -> HTTPException:
    return HTTPException(429, f"too much at once: {why}", {"Retry-After": str(RETRY_AFTER_S)})
