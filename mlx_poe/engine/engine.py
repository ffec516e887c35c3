"""Many requests over time, from any thread.

- in: prompts with their options, cancellations, specialists to attach
- out: each request's responses, as they come
- one thread owns the model and every array, since MLX's streams belong to a thread; the others see
  numbers, strings and queues
"""

from __future__ import annotations

import atexit
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import mlx.core as mx

from cognica_mlx.backend.streams import end_with_thread
from cognica_mlx.machines.link import Link
from cognica_mlx.machines.remote import lost_link
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.pace import KnownCosts
from mlx_poe.engine.scheduler import MAX_SEQUENCES, Scheduler, Stats
from mlx_poe.engine.ticket import EngineClosedError, EngineRequest, Listener, Wish
from mlx_poe.generation.request import GenerationRequest, Prompt, read_request
from mlx_poe.generation.responses import GenerationResponse, is_last
from mlx_poe.loading.model_info import ModelInfo, describe
from mlx_poe.loading.specialists import Specialists
from mlx_poe.loading.tokenizer import Tokenizer

# How many compositions to remember, by names and weights.
COMPOSITIONS = 16

Result = TypeVar("Result")


# Work for the engine's thread, and the future for its result.
_Command = tuple[Callable[[], Any], "Future[Any]"]


class Engine:
    """A model, its specialists, and a thread that decodes for all requests together.

    `max_sequences`, `memory` and `prompt_cache_bytes` are passed to `Scheduler`. With `costs`
    (`mlx_poe.machine.known_costs`), draft lengths suit this machine, and a mode that does not pay
    falls back to full depth. `specialists` are those already attached to the model; the engine
    takes them over. The model must have been loaded, and its arrays created, in the thread that
    creates the engine, or in one that is still running.

    All methods may be called from any thread.
    """

    def __init__(
        self,
        model: PoEModel,
        tokenizer: Tokenizer,
        max_sequences: int = MAX_SEQUENCES,
        memory: int | str | None = None,
        prompt_cache_bytes: int | str | None = None,
        *,
        costs: KnownCosts | None = None,
        specialists: Specialists | None = None,
    ):
        mx.eval(model.parameters())  # lazily loaded arrays belong to the loading thread
        self.tokenizer = tokenizer
        self._costs = costs
        self._specialists = specialists or Specialists(model)
        self._compositions: OrderedDict[tuple, PoEModel] = OrderedDict()
        self._requests: dict[GenerationRequest, EngineRequest] = {}
        # Called in the engine's thread after the listeners, once for all that a sweep has made.
        self.delivered: Callable[[], None] = lambda: None
        self._commands: SimpleQueue[_Command | None] = SimpleQueue()
        # Guards `_closed`: no command may be queued after the last.
        self._lock = threading.Lock()
        self._closed = False
        self._options: dict[str, Any] = {
            "max_sequences": max_sequences,
            "memory": memory,
            "prompt_cache_bytes": prompt_cache_bytes,
            # How far back a specialist can reuse what the base has read.
            "keep_trunk": 2 * model.config.sequence_len,
        }
        self._scheduler = Scheduler(**self._options)
        self.stats: Stats = self._scheduler.stats
        self._thread = threading.Thread(target=self._run, name="cognica-mlx engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # For callers

    def submit(
        self, prompt: Prompt, *, listener: Listener | None = None, **options: Any
    ) -> EngineRequest:
        """Queue a prompt. Returns once it has been checked, after the current pass at the latest.

        Takes the options of `prepare`. `listener` is called in the engine's thread with each
        response and, at the end, with None or the exception that ended the request. It must not
        block; if it raises, the request ends. Raises RequestError, before any work, for a request
        that cannot be carried out.
        """
        return self.start([self.prepare(prompt, **options)], [listener])[0]

    def prepare(
        self,
        prompt: Prompt,
        *,
        specialist: str | Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
        **options: Any,
    ) -> GenerationRequest:
        """A request, read and checked as far as any thread can do that.

        `specialist` is the name of an attached specialist, or several names whose predictions are
        mixed with `weights` (equal by default); None is the model itself. With `no_fallback` a mode
        continues even if full depth is faster. Other options are those of `stream_generate`.

        Raises RequestError for invalid arguments.
        """
        if "parks" in options:  # as version 0.2 called it
            options["no_fallback"] = not options.pop("parks")
        options = {"costs": self._costs, **options}
        return read_request(self.tokenizer, prompt, options, specialist=specialist, weights=weights)

    def start(
        self,
        requests: Sequence[GenerationRequest],
        listeners: Sequence[Listener | None] | None = None,
    ) -> list[EngineRequest]:
        """Queue several requests, with the listener of each: all of them or, on an error, none.

        They are added between two passes, so that they start together if there is room.
        """
        return self._call(lambda: self._add_all(requests, listeners or [None] * len(requests)))

    def describe(
        self, specialist: str | Sequence[str] | None = None, weights: Sequence[float] | None = None
    ) -> ModelInfo:
        """The model that a request with these arguments of `prepare` would use."""
        return self._call(lambda: describe(self._model(specialist, weights)))

    def attach(
        self,
        name: str,
        path_or_hf_repo: str | Path,
        *,
        revision: str | None = None,
        quantize: int | None = None,
    ) -> None:
        """Attach a specialist by name: see `Specialists.attach`. Requests wait while it loads."""
        options: dict[str, Any] = {"revision": revision, "quantize": quantize}
        self._call(lambda: self._specialists.attach(name, path_or_hf_repo, **options))

    def detach(self, name: str) -> None:
        """Detach a specialist. Requests that use it continue; its cached prompts are dropped."""
        self._call(lambda: self._detach(name))

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def specialists(self) -> tuple[str, ...]:
        """The names of the specialists attached, in the order of attaching."""
        return self._specialists.names

    @property
    def lost_link(self) -> Link | None:
        """The connection with the machines that hold other stages, if one of them is lost."""
        special = self._specialists
        return lost_link([special.base, *map(special.use, special.names)])

    def close(self) -> None:
        """End all requests and wait for the thread. Does nothing if already closed.

        Callers still waiting for a response get a RequestError.
        """
        with self._lock:
            if not self._closed:
                self._closed = True
                self._commands.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.close)

    def _call(self, work: Callable[[], Result]) -> Result:
        """Do `work` in the engine's thread and wait for its result."""
        result: Future[Result] = Future()
        with self._lock:
            if self._closed:
                raise EngineClosedError("the engine is closed")
            self._commands.put((work, result))
        return result.result()

    def _tell(self, request: GenerationRequest, wish: Wish) -> None:
        def work() -> None:
            if wish == "cancel":
                self._drop(request)
            else:
                getattr(self._scheduler, wish)(request)

        with self._lock:
            if not self._closed:
                self._commands.put((work, Future()))

    # In the engine's thread

    def _run(self) -> None:
        end_with_thread()
        error: Exception = EngineClosedError("the engine was closed before the reply was complete")
        try:
            while self._obey():
                try:
                    all_news = self._scheduler.step()
                except Exception as problem:
                    # Not the error of a single sequence. Let later requests start afresh.
                    self._fail_all(problem)
                    self._scheduler.close()
                    self._scheduler = Scheduler(**self._options)
                    all_news = []
                # Before delivery, so that the statistics include every delivered response.
                self.stats = self._scheduler.stats
                for request, news in all_news:
                    self._deliver(request, news)
                if all_news:
                    self._flush()
        except BaseException as problem:
            error = RuntimeError(f"the engine's thread has died: {problem!r}")
            raise
        finally:
            with self._lock:
                self._closed = True
            self._fail_all(error)
            while not self._commands.empty():
                if command := self._commands.get():
                    command[1].set_exception(error)
            self._scheduler.close()
            self.stats = self._scheduler.stats

    def _obey(self) -> bool:
        """Run the callers' commands; wait if there is nothing else to do. False means stop."""
        while True:
            try:
                command = self._commands.get(block=not len(self._scheduler))
            except Empty:
                return True
            if command is None:
                return False
            work, future = command
            try:
                result = work()
            except Exception as error:
                future.set_exception(error)
            else:
                self.stats = self._scheduler.stats
                future.set_result(result)

    def _add_all(
        self, requests: Sequence[GenerationRequest], listeners: Sequence[Listener | None]
    ) -> list[EngineRequest]:
        placed = [one.on(self._model(one.specialist, one.weights)) for one in requests]
        self._scheduler.add(*placed)
        added = {
            request: EngineRequest(partial(self._tell, request), listener)
            for request, listener in zip(placed, listeners, strict=True)
        }
        self._requests |= added
        return list(added.values())

    def _model(
        self, specialist: str | Sequence[str] | None, weights: Sequence[float] | None
    ) -> PoEModel:
        if specialist is None or isinstance(specialist, str):
            return self._specialists.choose(specialist, weights)
        key = tuple(specialist), None if weights is None else tuple(weights)
        if key not in self._compositions:
            self._compositions[key] = self._specialists.compose(specialist, weights)
            if len(self._compositions) > COMPOSITIONS:
                self._scheduler.cache.drop([self._compositions.popitem(last=False)[1]])
        self._compositions.move_to_end(key)
        return self._compositions[key]

    def _detach(self, name: str) -> None:
        gone = [self._specialists.use(name)]
        for key in [key for key in self._compositions if name in key[0]]:
            gone.append(self._compositions.pop(key))
        self._specialists.detach(name)
        self._scheduler.cache.drop(gone)

    def _drop(self, request: GenerationRequest) -> None:
        if self._requests.pop(request, None):
            self._scheduler.cancel(request)

    def _deliver(self, request: GenerationRequest, news: GenerationResponse | Exception) -> None:
        handle = self._requests.get(request)
        if handle is None:
            return
        try:
            if is_last(news):
                del self._requests[request]
            handle.deliver(news)
            if is_last(news) and not isinstance(news, Exception):
                handle.deliver(None)
        except Exception:
            # The listener raised, so there is nobody to tell.
            self._drop(request)

    def _fail_all(self, error: Exception) -> None:
        for request in self._requests.values():
            with suppress(Exception):  # a listener's
                request.deliver(error)
        self._requests.clear()
        self._flush()

    def _flush(self) -> None:
        with suppress(Exception):  # nobody is left to tell
            self.delivered()
