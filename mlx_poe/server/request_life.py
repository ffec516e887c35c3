"""A request's sequences: admitted, started, streamed, and released.

- in: a parsed request, as the frame of its response; the engine
- out: the response, whole or as server-sent events
- runs in the event loop's thread; the engine's responses arrive from the engine's thread, which
  wakes the loop once for all that a sweep has made, and for a whole response only at its end
- if a client disconnects, its places are freed at once; if it does not read, its sequences pause
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from functools import partial
from time import monotonic
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlx_poe.engine import Engine, EngineClosedError, EngineRequest, Listener
from mlx_poe.generation.responses import GenerationResponse, is_last
from mlx_poe.server.error_bodies import ApiError, as_api_error
from mlx_poe.server.metrics import Metrics
from mlx_poe.server.response_frame import ResponseFrame
from mlx_poe.server.shared_fields import Limits
from mlx_poe.server.wire import DONE, KEEP_ALIVE, Json, event

KEEP_ALIVE_SECONDS = 5.0
# How long a client may take to read what has been sent, and when its sequences let others run.
SLOW_SECONDS, STALLED_SECONDS = 30.0, 1.0

logger = logging.getLogger("mlx_poe.server")

Result = TypeVar("Result")


class ClientGone(Exception):
    """The client no longer waits for the response."""


class Service:
    """The engine, and how many of its places are taken."""

    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics):
        self.engine, self.limits, self.metrics = engine, limits, metrics
        # Sequences that run or wait, and a request's average duration in seconds.
        self.taken, self._mean_seconds = 0, 1.0
        self.closing = False
        # Runs that have news of this sweep; only the engine's thread looks.
        self._stirred: list[Run] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        engine.delivered = self._wake

    async def respond(self, frame: ResponseFrame, endpoint: str, receive: Receive) -> Response:
        """The whole response, or a stream."""
        run = await unless_gone(receive, self._start(frame, endpoint))
        if frame.options.stream:
            return EventStream(run)
        try:
            await unless_gone(receive, run.collect())
            return Json(frame.whole(), headers={"x-request-id": frame.id})
        finally:
            run.close()

    async def _start(self, frame: ResponseFrame, endpoint: str) -> Run:
        self._admit(len(frame.choices), "prompt" if len(frame.options.prompts) > 1 else "n")
        self._loop = asyncio.get_running_loop()
        run = Run(self, frame, endpoint)
        try:
            await run.begin()
        except BaseException:
            run.close()
            raise
        return run

    def _admit(self, count: int, param: str) -> None:
        """Take `count` places. ApiError if there are not enough."""
        if self.closing:
            raise EngineClosedError
        if count > self.limits.places:
            message = f"{count} sequences at once exceed the limit of {self.limits.places}"
            raise ApiError(400, message, param)
        if self.taken + count > self.limits.places:
            rounds = (self.taken + count) / self.limits.sequences
            wait = min(max(math.ceil(rounds * self._mean_seconds), 1), 60)
            message = f"{self.taken} of {self.limits.places} places are taken"
            headers = {"retry-after": str(wait)}
            raise ApiError(429, message, code="rate_limit_exceeded", headers=headers)
        self.taken += count

    def stir(self, run: Run) -> None:
        """Let a run go on at the end of this sweep. Called in the engine's thread."""
        self._stirred.append(run)

    def _wake(self) -> None:
        """Wake up the event loop, once for all runs. Called in the engine's thread."""
        stirred, self._stirred = self._stirred, []
        if stirred and self._loop:
            self._loop.call_soon_threadsafe(_go_on, stirred)

    def leave(self, count: int, seconds: float) -> None:
        """Give back `count` places, held for `seconds`."""
        self.taken -= count
        self._mean_seconds += (seconds - self._mean_seconds) / 10


class Run:
    """One request's sequences while they run."""

    def __init__(self, service: Service, frame: ResponseFrame, endpoint: str):
        self._service, self.frame = service, frame
        # How the request ends, unless nobody waits any more.
        self._endpoint, self._outcome = endpoint, "gone"
        # Put there by the engine's thread.
        self._news: deque[tuple[int, GenerationResponse | Exception]] = deque()
        self._arrived = asyncio.Event()
        self._silence = Alarm(KEEP_ALIVE_SECONDS, self._arrived.set)
        self._left, self._closed = len(frame.choices), False
        self._started = monotonic()
        self._requests: list[EngineRequest] = []
        self._first: float | None = None
        self._begun, self._paused = False, False

    async def begin(self) -> None:
        """Read the prompts and start them in the engine. ApiError if it refuses them."""
        listeners: list[Listener] = [partial(self._put, n) for n in range(self._left)]
        # In another thread: texts may be long, and the engine only listens between two passes.
        work = asyncio.ensure_future(anyio.to_thread.run_sync(self._submit, listeners))
        try:
            self._requests = await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(_cancel_all)
            raise
        self._begun = True

    def _submit(self, listeners: Sequence[Listener]) -> list[EngineRequest]:
        """Runs in a worker thread."""
        options, service = self.frame.options, self._service
        requests = options.requests(service.engine, service.limits.context)
        self.frame.tokens = [request.tokens for request in requests[:: options.n]]
        return service.engine.start(requests, listeners)

    def _put(self, index: int, item: GenerationResponse | Exception | None) -> None:
        """Runs in the engine's thread."""
        if item is None:  # the end, which the last response has told
            return
        if self._first is None and not isinstance(item, Exception):
            self._first = monotonic()
            self._service.metrics.first_token(self._first - self._started)
        self._news.append((index, item))
        if self.frame.options.stream or is_last(item):
            self._service.stir(self)

    def go_on(self) -> None:
        """Take what news there is."""
        if self._news:
            self._arrived.set()

    async def _take(self) -> list[tuple[int, GenerationResponse]]:
        """The responses that have arrived, by choice; none after `KEEP_ALIVE_SECONDS` without any.
        Raises the error that ended a sequence."""
        if not self._news:
            self._arrived.clear()
            with self._silence:
                await self._arrived.wait()
        found = []
        while self._news:
            index, item = self._news.popleft()
            if isinstance(item, Exception):
                raise item
            found.append((index, item))
            self._left -= is_last(item)
        return found

    async def collect(self) -> None:
        while self._left:
            for index, response in await self._take():
                self.frame.choices[index].add(response)
        self._outcome = "ok"

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The response as server-sent events. An error on the way becomes the last event."""
        yield b"".join(self.frame.first_chunks()) or KEEP_ALIVE
        try:
            while self._left:
                responses, chunks = await self._take(), []
                for index, response in responses:
                    chunks += self.frame.chunks(index, response)
                if chunks or not responses:
                    yield b"".join(chunks) or KEEP_ALIVE
        except Exception as error:
            problem = as_api_error(error)
            if problem.status == 500:
                logger.error("a reply ended early", exc_info=error)
            yield event(problem.as_json())
        else:
            yield b"".join(self.frame.last_chunks()) + DONE
            self._outcome = "ok"

    def pause(self) -> None:
        """Let other requests run until `resume`."""
        self._paused = True
        for request in self._requests:
            request.pause()

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            for request in self._requests:
                request.resume()

    def close(self) -> None:
        """Cancel unfinished sequences and give their places back."""
        if not self._closed:
            self._closed = True
            for request in self._requests:
                request.cancel()
            seconds, service = monotonic() - self._started, self._service
            service.leave(len(self.frame.choices), seconds)
            if self._begun:
                while self._news:  # made, but not waited for
                    index, item = self._news.popleft()
                    if not isinstance(item, Exception):
                        self.frame.choices[index].add(item)
                service.metrics.ended(self._endpoint, self._outcome, seconds, self.frame.usage)


class EventStream(Response):
    """A response that is sent as it is made."""

    def __init__(self, run: Run):
        headers = {"x-request-id": run.frame.id, "cache-control": "no-cache"}
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, unless the client disconnects or does not read."""
        try:
            await unless_gone(receive, self._send(send))
        except ClientGone:
            pass
        finally:
            self._run.close()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async with aclosing(self._run.stream()) as stream:
            with anyio.CancelScope() as scope:
                stalled = Alarm(STALLED_SECONDS, self._run.pause)
                slow = Alarm(SLOW_SECONDS, scope.cancel)
                async for data in stream:
                    with stalled, slow:
                        await send({"type": "http.response.body", "body": data, "more_body": True})
                    self._run.resume()
            if scope.cancelled_caught:
                raise ClientGone
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Alarm:
    """Calls `ring` if a block takes as long as `seconds`. Reused for many short blocks, it starts a
    timer only every `seconds`."""

    def __init__(self, seconds: float, ring: Callable[[], None]):
        self._seconds, self._ring = seconds, ring
        self._due: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> None:
        loop = asyncio.get_running_loop()
        self._due = loop.time() + self._seconds
        if not self._timer:
            self._timer = loop.call_at(self._due, self._look, loop)

    def __exit__(self, *_: object) -> None:
        self._due = None

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._due is None:
            return
        if loop.time() < self._due:
            self._timer = loop.call_at(self._due, self._look, loop)
        else:
            self._ring()


def _go_on(runs: Iterable[Run]) -> None:
    for run in runs:
        run.go_on()


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Do the work while the client is connected; ClientGone once it is not."""
    gone, doing = asyncio.ensure_future(_gone(receive)), asyncio.ensure_future(work)
    try:
        await asyncio.wait({gone, doing}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientGone
    finally:
        gone.cancel()
        doing.cancel()
        await asyncio.gather(gone, doing, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _cancel_all(work: asyncio.Future) -> None:
    """Cancel requests started for a client that has left."""
    if not work.cancelled() and work.exception() is None:
        for request in work.result():
            request.cancel()
