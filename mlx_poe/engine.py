"""Many requests over time, from any thread.

- in: prompts with their options, cancellations, specialists to attach
- out: for each request its responses, as they come
- one thread owns the model and every array: MLX's streams belong to a thread; the others see
  numbers, strings and queues
"""

from __future__ import annotations

import atexit
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import mlx.core as mx

from cognica_mlx.decoding.modes import MODES, PACED_MODES
from cognica_mlx.decoding.pace import KnownCosts
from cognica_mlx.errors import RequestError
from cognica_mlx.model import PoEModel
from mlx_poe.engine_request import EngineClosedError, EngineRequest, Item, Prepared
from mlx_poe.generate import DEFAULT_MAX_TOKENS, Prompt, read_request
from mlx_poe.model_info import ModelInfo, describe
from mlx_poe.responses import StopStrings
from mlx_poe.scheduler import MAX_SEQUENCES, Scheduler, Stats, Task, Update, make_task
from mlx_poe.specialists import Specialists
from mlx_poe.tokenizer import Tokenizer

# Compositions by names and weights that are remembered.
COMPOSITIONS = 16

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Command:
    """Something to be done in the engine's thread, and where its result goes."""

    work: Callable[[], Any]
    result: Future


class Engine:
    """A model, its specialists, and a thread that decodes for all requests together.

    `max_sequences`, `memory` and `prompt_cache_bytes` are those of `Scheduler`. With `costs`
    (`mlx_poe.machine.known_costs`) drafts are as long as pays on this machine, and a mode that does
    not pay goes over to full depth. `specialists` are those over the model that are attached
    already, from then on the engine's own. The model must be loaded, and its arrays made, in the
    thread that makes the engine, or one that still runs.

    All methods may be called from any thread.
    """

    def __init__(
        self,
        model: PoEModel,
        tokenizer: Tokenizer,
        max_sequences: int = MAX_SEQUENCES,
        memory: int | None = None,
        prompt_cache_bytes: int | None = None,
        *,
        costs: KnownCosts | None = None,
        specialists: Specialists | None = None,
    ):
        mx.eval(model.parameters())  # what was loaded lazily belongs to the loading thread
        self.tokenizer = tokenizer
        self._costs = costs
        self._specialists = specialists or Specialists(model)
        self._compositions: OrderedDict[tuple, PoEModel] = OrderedDict()
        self._requests: dict[Task, EngineRequest] = {}
        self._commands: SimpleQueue[_Command | None] = SimpleQueue()
        # Guards `_closed`: no command may follow the last.
        self._lock = threading.Lock()
        self._closed = False
        self._options: dict[str, Any] = {
            "max_sequences": max_sequences,
            "memory": memory,
            "prompt_cache_bytes": prompt_cache_bytes,
            # So far back a specialist takes up what the base has read.
            "keep_trunk": 2 * model.config.sequence_len,
        }
        self._scheduler = Scheduler(tokenizer, **self._options)
        self.stats: Stats = self._scheduler.stats
        self._thread = threading.Thread(target=self._run, name="cognica-mlx engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # For callers

    def submit(self, prompt: Prompt, **options: Any) -> EngineRequest:
        """Let a prompt wait for its turn; returns once it has been checked, at the latest after the
        pass that is under way.

        `options` are those of `prepare`. Raises RequestError for whatever cannot be done, before
        any of it is.
        """
        return self.start([self.prepare(prompt, **options)])[0]

    def prepare(
        self,
        prompt: Prompt,
        *,
        specialist: str | Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
        mode: str = "full",
        max_tokens: int = DEFAULT_MAX_TOKENS,
        stop: str | Sequence[str] | None = None,
        listener: Callable[[Item], None] | None = None,
        parks: bool = True,
        **options: Any,
    ) -> Prepared:
        """A request, read and checked as far as that can be done in any thread.

        `specialist` is the name of one that is attached, or several names, whose predictions are
        mixed by `weights` (equally unless given); None is the model itself. `listener` is called in
        the engine's thread with each response and then, at the end, with None or the exception that
        was the cause; it must not block, and if it raises, the request ends. Without `parks` a mode
        goes on even where full depth is faster. Other arguments are those of `stream_generate`.

        Raises RequestError for what can be seen to be impossible.
        """
        if not isinstance(mode, str) or mode not in MODES:
            raise RequestError(f"mode {mode!r} is none of {', '.join(MODES)}")
        StopStrings(stop)
        asked = read_request(self.tokenizer, prompt, options)
        return Prepared(asked, specialist, weights, mode, max_tokens, stop, parks, listener)

    def start(self, requests: Sequence[Prepared]) -> list[EngineRequest]:
        """Let several requests wait for their turns: all of them, or, with an error, none.

        They are added between two passes, so that they begin together where there is room.
        """
        return self._call(lambda: self._add_all(requests))

    def describe(
        self, specialist: str | Sequence[str] | None = None, weights: Sequence[float] | None = None
    ) -> ModelInfo:
        """What a request for these, as for `prepare`, would be answered with."""
        return self._call(lambda: describe(self._model(specialist, weights)))

    def attach(
        self,
        name: str,
        path_or_hf_repo: str | Path,
        *,
        revision: str | None = None,
        quantize: int | None = None,
    ) -> None:
        """Attach a specialist by name: see `Specialists.attach`. Requests wait while it is read."""
        self._call(
            lambda: self._attach(name, path_or_hf_repo, revision=revision, quantize=quantize)
        )

    def detach(self, name: str) -> None:
        """Forget a specialist. Requests that use it go on; what was kept for it goes."""
        self._call(lambda: self._detach(name))

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._closed

    @property
    def specialists(self) -> tuple[str, ...]:
        """The names of the specialists attached, in the order of attaching."""
        return self._specialists.names

    def close(self) -> None:
        """End all requests and wait for the thread; nothing if it is closed already.

        Whoever waits for a response then gets a RequestError.
        """
        with self._lock:
            if not self._closed:
                self._closed = True
                self._commands.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.close)

    def _call(self, work: Callable[[], Result]) -> Result:
        """Do something in the engine's thread, and wait for its result."""
        command = _Command(work, Future())
        with self._lock:
            if self._closed:
                raise EngineClosedError("the engine is closed")
            self._commands.put(command)
        return command.result.result()

    def _cancel(self, task: Task) -> None:
        with self._lock:
            if not self._closed:
                self._commands.put(_Command(lambda: self._drop(task), Future()))

    # In the engine's thread

    def _run(self) -> None:
        error: Exception = EngineClosedError("the engine was closed before the reply was complete")
        try:
            while True:
                if not self._obey():
                    break
                try:
                    updates = self._scheduler.step()
                except Exception as problem:
                    # Not one sequence's: whatever it is, later requests start afresh.
                    self._fail_all(problem)
                    self._scheduler.close()
                    self._scheduler = Scheduler(self.tokenizer, **self._options)
                    updates = []
                # Whoever sees a response finds it in the figures.
                self.stats = self._scheduler.stats
                for update in updates:
                    self._deliver(update)
        except BaseException as problem:
            error = RuntimeError(f"the engine's thread has died: {problem!r}")
            raise
        finally:
            with self._lock:
                self._closed = True
            self._fail_all(error)
            self._refuse_commands(error)
            self._scheduler.close()
            self.stats = self._scheduler.stats
            # A stream that outlives its thread takes the process down when that ends.
            mx.clear_streams()

    def _obey(self) -> bool:
        """Do what callers have asked for; waits where there is nothing else to do. False to end."""
        while True:
            try:
                command = self._commands.get(block=not len(self._scheduler))
            except Empty:
                return True
            if command is None:
                return False
            try:
                result = command.work()
            except Exception as error:
                command.result.set_exception(error)
            else:
                self.stats = self._scheduler.stats
                command.result.set_result(result)

    def _refuse_commands(self, error: Exception) -> None:
        with suppress(Empty):
            while True:
                if command := self._commands.get(block=False):
                    command.result.set_exception(error)

    def _add_all(self, requests: Sequence[Prepared]) -> list[EngineRequest]:
        tasks = [self._task(request) for request in requests]
        self._scheduler.add(*tasks)
        added = []
        for task, request in zip(tasks, requests, strict=True):
            added.append(EngineRequest(partial(self._cancel, task), request.listener))
            self._requests[task] = added[-1]
        return added

    def _task(self, request: Prepared) -> Task:
        model = self._model(request.specialist, request.weights)
        watched = request.parks and request.mode in PACED_MODES
        return make_task(
            model,
            request.asked,
            request.mode,
            max_tokens=request.max_tokens,
            stop=request.stop,
            costs=self._costs if watched else None,
        )

    def _model(
        self, specialist: str | Sequence[str] | None, weights: Sequence[float] | None
    ) -> PoEModel:
        if specialist is None or isinstance(specialist, str):
            if weights is not None:
                raise RequestError("weights are for several specialists")
            return self._specialists.use(specialist)
        key = tuple(specialist), None if weights is None else tuple(weights)
        if key not in self._compositions:
            self._compositions[key] = self._specialists.compose(specialist, weights)
            if len(self._compositions) > COMPOSITIONS:
                self._scheduler.cache.drop([self._compositions.popitem(last=False)[1]])
        self._compositions.move_to_end(key)
        return self._compositions[key]

    def _attach(self, name: str, path: str | Path, **options: Any) -> None:
        self._specialists.attach(name, path, **options)

    def _detach(self, name: str) -> None:
        gone = [self._specialists.use(name)]
        for key in [key for key in self._compositions if name in key[0]]:
            gone.append(self._compositions.pop(key))
        self._specialists.detach(name)
        self._scheduler.cache.drop(gone)

    def _drop(self, task: Task) -> None:
        """A request was cancelled."""
        if self._requests.pop(task, None):
            self._scheduler.cancel(task)

    def _deliver(self, update: Update) -> None:
        request = self._requests.get(update.task)
        if request is None:
            return
        try:
            if update.response:
                request.deliver(update.response)
            if update.ended:
                del self._requests[update.task]
                request.deliver(update.error)
        except Exception:
            # Its listener's: nobody is there to be told.
            self._drop(update.task)

    def _fail_all(self, error: Exception) -> None:
        for request in self._requests.values():
            with suppress(Exception):  # a listener's
                request.deliver(error)
        self._requests.clear()
