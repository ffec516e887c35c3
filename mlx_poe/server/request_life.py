"""A request's sequences: admitted, started, streamed, and released.

- in: a parsed request; the engine
- out: an answer, whole or as server-sent events
- runs in the event loop's thread; the engine's responses arrive from the engine's thread
- if a client disconnects, its places are freed at once; if it does not read, its sequences pause
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import replace
from time import monotonic
from typing import Any, Protocol, TypeVar

import anyio
import anyio.to_thread
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlx_poe.engine import Engine, EngineClosedError, EngineRequest, Item, Prepared
from mlx_poe.generation.responses import GenerationResponse
from mlx_poe.loading.tokenizer import Tokenizer
from mlx_poe.server.error_bodies import ApiError, as_api_error
from mlx_poe.server.metrics import Metrics
from mlx_poe.server.response_frame import Answer
from mlx_poe.server.shared_fields import Limits, Options
from mlx_poe.server.wire import DONE, KEEP_ALIVE, Json, event

KEEP_ALIVE_SECONDS = 5.0
# How long a client may take to read what has been sent, and when its sequences let others run.
SLOW_SECONDS, STALLED_SECONDS = 30.0, 1.0

logger = logging.getLogger("mlx_poe.server")

Result = TypeVar("Result")


class Asked(Protocol):
    """A parsed request: `ChatRequest` or `CompletionRequest`."""

    @property
    def options(self) -> Options:
        """How to answer."""

    @property
    def prompts(self) -> list[Any]:
        """One or more."""

    def answer(self, tokenizer: Tokenizer, tokens: Sequence[Sequence[int]]) -> Answer:
        """An empty answer; `tokens` are those of each prompt."""


class ClientGone(Exception):
    """The client no longer waits for the answer."""


class Service:
    """The engine, and how many of its places are taken."""

    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics):
        self.engine, self.limits, self.metrics = engine, limits, metrics
        # Sequences that run or wait, and a request's average duration in seconds.
        self.taken, self._mean_seconds = 0, 1.0
        self.closing = False

    async def answer(self, asked: Asked, endpoint: str, receive: Receive) -> Response:
        """The whole answer, or a stream."""
        run = await unless_gone(receive, self._start(asked, endpoint))
        if asked.options.stream:
            return EventStream(run)
        try:
            await unless_gone(receive, run.collect())
            return Json(run.answer.whole(), headers={"x-request-id": run.answer.id})
        finally:
            run.close()

    async def _start(self, asked: Asked, endpoint: str) -> Run:
        count = len(asked.prompts) * asked.options.n
        self._admit(count, "prompt" if len(asked.prompts) > 1 else "n")
        run = Run(self, asked, endpoint, count)
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

    def leave(self, count: int, seconds: float) -> None:
        """Give back `count` places, held for `seconds`."""
        self.taken -= count
        self._mean_seconds += (seconds - self._mean_seconds) / 10


class Run:
    """One request's sequences while they run."""

    def __init__(self, service: Service, asked: Asked, endpoint: str, count: int):
        self._service, self._asked, self._count = service, asked, count
        self._record = service.metrics.begin(endpoint)
        self._items: list[tuple[int, Item]] = []
        self._come = asyncio.Event()
        self._left, self._closed = count, False
        self._started = monotonic()
        self._requests: list[EngineRequest] = []
        self._begun, self._paused = False, False
        self.answer: Answer

    async def begin(self) -> None:
        """Read the prompts and start them in the engine. ApiError if it refuses them."""
        loop = asyncio.get_running_loop()

        def listener(index: int) -> Callable[[Item], None]:
            return lambda item: loop.call_soon_threadsafe(self._put, index, item)  # type: ignore

        listeners = [listener(index) for index in range(self._count)]
        # In another thread: texts may be long, and the engine only answers between two passes.
        work = asyncio.ensure_future(anyio.to_thread.run_sync(self._submit, listeners))
        try:
            self._requests, tokens = await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(_cancel_all)
            raise
        self.answer = self._asked.answer(self._service.engine.tokenizer, tokens)
        self._begun = True

    def _submit(
        self, listeners: Sequence[Callable[[Item], None]]
    ) -> tuple[list[EngineRequest], list[Sequence[int]]]:
        """The requests, and the tokens of each prompt. Runs in a worker thread."""
        options, engine = self._asked.options, self._service.engine
        prepared: list[Prepared] = []
        for prompt in self._asked.prompts:
            for choice in range(options.n):
                about = options.submission(choice)
                one = engine.prepare(prompt, listener=listeners[len(prepared)], **about)
                prepared.append(replace(one, max_tokens=self._room(len(one.asked.tokens))))
        return engine.start(prepared), [one.asked.tokens for one in prepared[:: options.n]]

    def _room(self, prompt_tokens: int) -> int:
        """How many tokens to generate after a prompt."""
        options, most = self._asked.options, self._service.limits.context
        wanted = options.max_tokens
        if wanted is None:
            wanted = max(min(options.default_max_tokens, most - prompt_tokens), 1)
        if prompt_tokens + wanted > most:
            message = (
                f"{prompt_tokens} prompt tokens and {wanted} to generate exceed the limit of "
                f"{most} together"
            )
            raise ApiError(400, message, "max_tokens", "context_length_exceeded")
        # Even a prompt that is only scored generates one token.
        return max(wanted, 1)

    def _put(self, index: int, item: Item) -> None:
        self._items.append((index, item))
        self._come.set()

    async def _take(self) -> list[tuple[int, Item]]:
        """The items that have arrived, by sequence; none after `KEEP_ALIVE_SECONDS` without any."""
        if not self._items:
            self._come.clear()
            with anyio.move_on_after(KEEP_ALIVE_SECONDS):
                await self._come.wait()
        items, self._items = self._items, []
        for _, item in items:
            if isinstance(item, Exception):
                raise item
            self._left -= item is None
        if items:
            self._record.first_token()
        return items

    async def collect(self) -> None:
        """Wait for the whole answer."""
        while self._left:
            for index, item in await self._take():
                if isinstance(item, GenerationResponse):
                    self.answer.add(index, item)
        self._record.outcome = "ok"

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events. An error on the way becomes the last event."""
        yield b"".join(map(event, self.answer.first_chunks())) or KEEP_ALIVE
        try:
            while self._left:
                items, chunks = await self._take(), []
                for index, item in items:
                    if isinstance(item, GenerationResponse):
                        chunks += self.answer.chunks(index, item)
                if chunks or not items:
                    yield b"".join(map(event, chunks)) or KEEP_ALIVE
        except Exception as error:
            problem = as_api_error(error)
            if problem.status == 500:
                logger.error("a reply ended early", exc_info=error)
            yield event(problem.as_json())
        else:
            yield b"".join(map(event, self.answer.last_chunks())) + DONE
            self._record.outcome = "ok"

    def pause(self) -> None:
        """Let other requests run until `resume`."""
        self._paused = True
        for request in self._requests:
            request.pause()

    def resume(self) -> None:
        """Go on, if paused."""
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
            self._service.leave(self._count, monotonic() - self._started)
            self._record.end(self.answer.usage if self._begun else None)


class EventStream(Response):
    """An answer that is sent as it is made."""

    def __init__(self, run: Run):
        headers = {"x-request-id": run.answer.id, "cache-control": "no-cache"}
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
            async for data in stream:
                stalled = asyncio.get_running_loop().call_later(STALLED_SECONDS, self._run.pause)
                with anyio.move_on_after(SLOW_SECONDS) as scope:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                stalled.cancel()
                if scope.cancelled_caught:
                    raise ClientGone
                self._run.resume()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


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
        for request in work.result()[0]:
            request.cancel()
