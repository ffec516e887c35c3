"""Many prompts over time: which run together, how much memory they use, what they share.

- in: requests, first come, first served
- out: for each request, a response per token, then its end
- a request starts once there is a slot and enough memory for the most it may need; cached prompts,
  and quantized copies that no running request drafts with, make room for it
- if another is about to have read the beginning of its prompt, it starts after that
- a request can pause: it gives up its slot and its memory, and goes on later
- synchronous, for one thread; `Engine` and `batch_generate` are built on it
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from weakref import WeakSet

import mlx.core as mx

from cognica_mlx.decoding.batch import Batch, Event
from cognica_mlx.decoding.footprint import state_bytes
from cognica_mlx.decoding.quantized_prefix import QuantizedPrefix
from cognica_mlx.decoding.requests import Resumable, Steps
from cognica_mlx.decoding.sequence import prefill_step_size_here, read_prompt, ready
from cognica_mlx.decoding.speculative import Speculative
from cognica_mlx.decoding.state import MAX_PENDING, DecodingState
from cognica_mlx.errors import RequestError
from cognica_mlx.files.byte_sizes import byte_size, size_text
from mlx_poe.engine.memory import memory_for_states
from mlx_poe.generation.prompt_cache import LEAST, PromptCache
from mlx_poe.generation.request import GenerationRequest
from mlx_poe.generation.responses import GenerationResponse, Reply, is_last

MAX_SEQUENCES = 32
# Copy a state's activations once their arrays hold this many positions of other sequences.
EXCESS = 256
# A request waits for another to read this many positions that it would read too.
WORTH_WAITING = 64

# A response, or the error that ended a request.
News = tuple[GenerationRequest, GenerationResponse | Exception]


@dataclass(frozen=True)
class Stats:
    """Totals and current figures. Times are in seconds, memory in bytes.

    prompt_time and generation_time: the decoding time, split in proportion to the positions run
    for prompts and replies, since some prompts are read while others' replies are generated; the
    `..._tps` are tokens per second of that. state_bytes: the most that running sequences may come
    to need; together with cache_bytes and copy_bytes, those of quantized copies, it never exceeds
    memory_bytes.
    """

    prompt_tokens: int = 0
    generation_tokens: int = 0
    prompt_time: float = 0.0
    generation_time: float = 0.0
    running: int = 0
    waiting: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    cached_tokens: int = 0
    cache_entries: int = 0
    cache_bytes: int = 0
    state_bytes: int = 0
    memory_bytes: int = 0
    paused: int = 0
    copy_bytes: int = 0

    @property
    def prompt_tps(self) -> float:
        """Tokens per second; 0 before any."""
        return self.prompt_tokens / self.prompt_time if self.prompt_time else 0.0

    @property
    def generation_tps(self) -> float:
        """Tokens per second; 0 before any."""
        return self.generation_tokens / self.generation_time if self.generation_time else 0.0

    @property
    def peak_memory(self) -> float:
        """The whole process's, in GB."""
        return mx.get_peak_memory() / 1e9


class _Running(Reply):
    """A reply that has begun. `need` is the most bytes that its state may take."""

    need = 0

    @property
    def state(self) -> DecodingState:
        return self.sequence.state


class Scheduler:
    """Runs requests, `max_sequences` at a time.

    `memory` is the most bytes for states and cached prompts together (default:
    `memory_for_states()`), `prompt_cache_bytes` the most for cached prompts (default: a quarter of
    it); both may be text, such as "8GB". `keep_trunk` is passed to the states: if several models
    over one base are served, twice the base's `sequence_len` lets them share what it has read.
    """

    def __init__(
        self,
        *,
        max_sequences: int = MAX_SEQUENCES,
        memory: int | str | None = None,
        prompt_cache_bytes: int | str | None = None,
        keep_trunk: int = 0,
    ):
        if max_sequences < 1:
            raise RequestError(f"max_sequences {max_sequences} must be at least 1")
        self.max_sequences = max_sequences
        self.memory = memory_for_states() if memory is None else byte_size(memory)
        cached = self.memory // 4 if prompt_cache_bytes is None else byte_size(prompt_cache_bytes)
        self.cache = PromptCache(cached)
        self.keep_trunk = keep_trunk
        self._batch = Batch()
        self._waiting: deque[GenerationRequest] = deque()
        self._running: dict[GenerationRequest, _Running] = {}
        # Requests that have begun but are not running, and those that may not start.
        self._begun: dict[GenerationRequest, _Running] = {}
        self._paused: set[GenerationRequest] = set()
        # Whom a request has waited for to read what it would read too: one at most.
        self._readers: dict[GenerationRequest, GenerationRequest] = {}
        # Kept from call to call: an interruption must not lose any.
        self._events: deque[Event] = deque()
        self._news: list[News] = []
        # Quantized copies in memory.
        self._prefixes: WeakSet[QuantizedPrefix] = WeakSet()
        self._prompt_tokens = self._generation_tokens = 0
        self._prompt_time = self._generation_time = 0.0

    def __len__(self) -> int:
        """How many requests have not ended, or not as far as is told; without those paused."""
        untold = sum(is_last(news) for _, news in self._news)
        return len(self._waiting) + len(self._running) + untold

    @property
    def stats(self) -> Stats:
        return Stats(
            *(self._prompt_tokens, self._generation_tokens),
            *(self._prompt_time, self._generation_time),
            *(len(self._running), len(self._waiting)),
            *(self.cache.hits, self.cache.misses, self.cache.cached_tokens),
            *(len(self.cache), self.cache.nbytes, self._promised, self.memory),
            *(len(self._paused), _bytes(self._prefixes)),
        )

    def add(self, *requests: GenerationRequest) -> None:
        """Queue requests: all of them, or none.

        Raises RequestError for a request that could never run.
        """
        for request in requests:
            self.check(request)
        self._waiting.extend(requests)

    def check(self, request: GenerationRequest) -> None:
        """Raise RequestError for a request that needs more memory than the budget."""
        need, copies = self.bytes_needed(request), _bytes(request.prefixes)
        if need + copies > self.memory:
            quantized = f", with {size_text(copies)} of quantized stages" if copies else ""
            raise RequestError(
                f"{len(request.tokens)} tokens of prompt and {request.max_tokens} to generate may "
                f"need {size_text(need + copies)}{quantized}, but all sequences together may take "
                f"{size_text(self.memory)}: allow more memory, or fewer tokens"
            )

    def bytes_needed(self, request: GenerationRequest, state: DecodingState | None = None) -> int:
        """The most bytes that the request's state can need, if it continues from `state`."""
        last, mode = request.model.poe_n_stages - 1, request.mode
        drafting = mode if isinstance(mode, Speculative) else None
        drafts = drafting.most if drafting else 0
        plain = mode.depth == mode.prefill_stage == last
        return state_bytes(
            request.model,
            len(request.tokens) + request.max_tokens + drafts,
            keep_trunk=self.keep_trunk,
            pending=0 if plain and not drafts else MAX_PENDING,
            spare=EXCESS if drafts or self.max_sequences > 1 else 0,
            chunk=request.prefill_step_size or prefill_step_size_here(),
            start=state,
            aside=drafting.prefix.of if drafting and drafting.prefix else (),
        )

    def cancel(self, request: GenerationRequest) -> None:
        """End a request, running or waiting, if it has not ended. What it read stays cached."""
        if request in self._running:
            self._finish(self._running[request])
        self._forget(request)

    def pause(self, request: GenerationRequest) -> None:
        """Take a request's slot and memory away until `resume`; do nothing if it has ended. What it
        read stays cached, as long as there is room, and its reply goes on where it was."""
        running = self._running.get(request)
        if running and not running.over:
            self._paused.add(request)
            self._begun[request] = running
            self._finish(running)
        elif request in self._waiting:
            self._paused.add(request)
            self._waiting.remove(request)

    def resume(self, request: GenerationRequest) -> None:
        """Let a paused request go on, before all that wait; do nothing if it is not paused."""
        if request in self._paused:
            self._paused.remove(request)
            self._waiting.appendleft(request)

    def close(self) -> None:
        """End all requests and free their memory, and that of cached prompts."""
        for requests in (self._waiting, self._begun, self._paused, self._readers):
            requests.clear()
        for news in (self._events, self._news):
            news.clear()
        self._batch.close()
        self._running.clear()
        self.cache.shrink(0)

    def step(self) -> list[News]:
        """Work until there is news, for at most one sweep of the batch: responses, and the errors
        that ended requests. An interruption loses none: the next call continues."""
        started = time.perf_counter()
        self._admit()
        before = [
            (running, running.state.positions_run[0], running.count > 0)
            for running in self._running.values()
        ]
        self._events += self._batch.run()
        while self._events:
            self._hear(self._events.popleft())
        for running in [running for running in self._running.values() if running.over]:
            self._finish(running)
        self._charge(time.perf_counter() - started, before)
        for running in self._running.values():
            running.state.compact(EXCESS)
        news, self._news = self._news, []
        return news

    def _hear(self, event: Event) -> None:
        """Make news of an event, unless its request was canceled or its reply is complete."""
        request, response = event.name, event.token
        assert isinstance(request, GenerationRequest)
        running = self._running.get(request) or self._begun.get(request)
        if running is None:
            return
        if response:
            self._generation_tokens += 1
            if response.generation_tokens == 1:
                self._prompt_tokens += response.prompt_tokens
            self._news.append((request, response))
        elif not running.over:
            self._forget(request)
            error = event.error or RuntimeError("the sequence ended before its reply did")
            self._news.append((request, error))

    def _forget(self, request: GenerationRequest) -> None:
        """Drop a request that has ended, wherever it is."""
        self._running.pop(request, None)
        self._begun.pop(request, None)
        self._paused.discard(request)
        self._readers.pop(request, None)
        if request in self._waiting:
            self._waiting.remove(request)

    @property
    def _free(self) -> int:
        """Bytes that no running sequence may come to need, free for cached prompts."""
        return self.memory - self._promised - _bytes(self._prefixes)

    @property
    def _promised(self) -> int:
        return sum(running.need for running in self._running.values())

    def _admit(self) -> None:
        """Start waiting requests in order, as far as slots and memory allow."""
        for request in [*islice(self._waiting, self.max_sequences)]:
            if request not in self._running:  # it is if an interruption came right after its start
                if len(self._running) >= self.max_sequences:
                    break
                if self._is_being_read(request):
                    continue
                if not self._make_room(request):
                    break
                try:
                    self._start(request)
                except BaseException as error:
                    self._running.pop(request, None)
                    self._batch.remove(request)
                    if not isinstance(error, Exception):
                        raise
                    self._begun.pop(request, None)
                    self._news.append((request, error))
            self._readers.pop(request, None)
            self._waiting.remove(request)
            self.cache.shrink(self._free)

    def _is_being_read(self, request: GenerationRequest) -> bool:
        """Whether a running request is reading a beginning of this one's prompt that will be kept.

        Nobody waits for a second one, which could go on for ever."""
        if request in self._begun or request.prompt_logprobs:
            return False
        waited_for = self._readers.get(request)
        for other in [waited_for] if waited_for else self._running:
            running = self._running.get(other)
            if running and other.model is request.model and running.count == 0:
                read, end = running.state.length + WORTH_WAITING, len(request.tokens)
                marks = [mark for mark in other.marks if read <= mark < end]
                if any(other.tokens[:mark] == request.tokens[:mark] for mark in marks):
                    self._readers[request] = other
                    return True
        return False

    def _make_room(self, request: GenerationRequest) -> bool:
        """Whether a request fits beside those that run, if need be without the quantized copies
        that none of them drafts with; those then give their memory back."""
        used = request.prefixes.union(*(other.prefixes for other in self._running))
        room = self.memory - self._promised - self.bytes_needed(request)
        if room < _bytes({*self._prefixes, *used}):
            if room < _bytes(used):
                return False
            keys = {key for prefix in used for key in prefix.sizes}
            for prefix in {*self._prefixes} - used:
                prefix.release(but=keys)
                self._prefixes.remove(prefix)
        return True

    def _start(self, request: GenerationRequest) -> None:
        self._prefixes.update(request.prefixes)
        begun, free, found = self._begun.get(request), self._free, None
        if begun or not request.prompt_logprobs:
            found = self.cache.find(
                request.model,
                begun.sequence.text if begun else request.tokens,
                request.mode.depth,
                [other.state for other in self._running.values()],
                # A state that has grown long may be too large for a short request.
                lambda state: self.bytes_needed(request, state) <= free,
            )
        state = found or DecodingState(request.model, keep_trunk=self.keep_trunk)
        running = begun or _Running(
            request, state, lambda *_: running.state.compact(EXCESS), cached=state.length
        )
        running.sequence.state, running.need = state, self.bytes_needed(request, state)
        self._running[request] = running
        steps = Resumable(partial(self._steps, running))
        self._batch.add(request, steps, running.pace, running.add)
        self._begun.pop(request, None)

    def _steps(self, running: _Running) -> Steps:
        """Read the prompt up to each mark and keep the state, then run the sequence's own steps."""
        request, sequence, state = running.request, running.sequence, running.state
        for mark in request.marks:
            if state.length + LEAST <= mark < len(request.tokens):
                yield from ready(state, request.mode.depth, request.prefill_step_size)
                rest = request.tokens[state.length : mark]
                depth, size = request.mode.prefill_stage, request.prefill_step_size
                yield from read_prompt(state, rest, depth, size, sequence.progress)
                self.cache.put(state.fork(), self._free)
        yield from sequence.steps()

    def _finish(self, running: _Running) -> None:
        """Take a request out of the batch: roll its state back to the end of its text and keep it,
        for the next turn or until it is resumed."""
        request, state = running.request, running.state
        self._batch.remove(request)
        del self._running[request]
        running.sequence.state = DecodingState(request.model)  # the other is the cache's now
        end = len(request.tokens) + running.count
        if state.length > end:
            state.rollback(end)
        self.cache.put(state, self._free)

    def _charge(self, seconds: float, before: Sequence[tuple[_Running, int, bool]]) -> None:
        """Split the time between prompts and replies, in proportion to the positions run."""
        prompts = replies = 0
        for running, ran, replying in before:
            count = running.state.positions_run[0] - ran
            prompts, replies = prompts + count * (not replying), replies + count * replying
        share = prompts / (prompts + replies) if prompts else 0.0
        self._prompt_time += seconds * share
        self._generation_time += seconds * (1 - share)


def _bytes(prefixes: Collection[QuantizedPrefix]) -> int:
    """What quantized copies take; they may share matrices."""
    return sum({key: size for prefix in prefixes for key, size in prefix.sizes.items()}.values())
