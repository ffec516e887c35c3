"""Many prompts over time: which run together, how much memory they use, what they share.

- in: tasks, first come, first served
- out: for each task, a response per token, then its end
- a task starts once there is a slot and enough memory for the most it may need; cached prompts
  make room for it
- synchronous, for one thread; `Engine` and `batch_generate` are built on it
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakSet

from cognica_mlx.costs import Costs
from cognica_mlx.decoding.batch import Batch
from cognica_mlx.decoding.modes import last_resort, make_mode
from cognica_mlx.decoding.pace import KnownCosts, Pace, pace_for
from cognica_mlx.decoding.requests import Steps
from cognica_mlx.decoding.rounded_prefix import RoundedPrefix
from cognica_mlx.decoding.sequence import (
    DecodingSequence,
    Mode,
    prefill_step_size_here,
    read_prompt,
    ready,
)
from cognica_mlx.decoding.speculative import Speculative
from cognica_mlx.errors import RequestError
from cognica_mlx.footprint import made_for, state_bytes
from cognica_mlx.model import PoEModel
from cognica_mlx.sampling import Sampler
from cognica_mlx.state import MAX_PENDING, DecodingState
from mlx_poe.generate import Asked
from mlx_poe.memory import memory_for_states
from mlx_poe.prompt_cache import LEAST, PromptCache
from mlx_poe.responses import GenerationResponse, Responses, StopStrings
from mlx_poe.tokenizer import Tokenizer

MAX_SEQUENCES = 8
# Copy a state's activations once their arrays hold this many positions of other sequences.
EXCESS = 256


@dataclass(frozen=True, eq=False)
class Task:
    """One prompt and everything that determines its reply; compared by identity."""

    model: PoEModel
    asked: Asked
    mode: Mode
    max_tokens: int
    stop: str | Sequence[str] | None = None
    step_size: int | None = None
    pace: Pace | None = None

    @property
    def tokens(self) -> Sequence[int]:
        """The prompt's tokens."""
        return self.asked.tokens


def make_task(
    model: PoEModel,
    asked: Asked,
    mode: str,
    *,
    max_tokens: int,
    stop: str | Sequence[str] | None = None,
    prefill_step_size: int | None = None,
    costs: Costs | KnownCosts | None = None,
) -> Task:
    """A checked task. Raises RequestError for anything that `stream_generate` would refuse."""
    chosen = make_mode(model, mode, asked.mode_options, model.calibration)
    StopStrings(stop)
    # Checks the remaining options; it holds no memory yet.
    DecodingSequence(
        model,
        asked.tokens,
        chosen,
        max_tokens=max_tokens,
        sampler=Sampler(asked.sampling),
        prefill_step_size=prefill_step_size,
    )
    pace = pace_for(model, chosen, costs)
    return Task(model, asked, chosen, max_tokens, stop, prefill_step_size, pace)


@dataclass(frozen=True)
class Update:
    """News of a task: a response, or its end (`ended`), perhaps because of `error`."""

    task: Task
    response: GenerationResponse | None = None
    error: Exception | None = None
    ended: bool = False


@dataclass(frozen=True)
class Stats:
    """Totals and current figures. Times are in seconds, memory in bytes.

    prompt_time and generation_time: the decoding time, split in proportion to the positions run
    for prompts and replies. state_bytes: the most that running sequences may come to need; together
    with cache_bytes it never exceeds memory_bytes.
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


@dataclass(eq=False)
class _Running:
    task: Task
    state: DecodingState
    sequence: DecodingSequence
    responses: Responses
    need: int


class Scheduler:
    """Runs tasks, `max_sequences` at a time.

    `memory` is the most bytes for states and cached prompts together (default:
    `memory_for_states()`), `prompt_cache_bytes` the most for cached prompts (default: a quarter of
    it). `keep_trunk` is passed to the states: if several models over one base are served, twice
    the base's `sequence_len` lets them share what it has read.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_sequences: int = MAX_SEQUENCES,
        memory: int | None = None,
        prompt_cache_bytes: int | None = None,
        keep_trunk: int = 0,
    ):
        if max_sequences < 1:
            raise RequestError(f"max_sequences {max_sequences} must be at least 1")
        self.tokenizer, self.max_sequences = tokenizer, max_sequences
        self.memory = memory_for_states() if memory is None else memory
        if prompt_cache_bytes is None:
            prompt_cache_bytes = self.memory // 4
        if self.memory < 0 or prompt_cache_bytes < 0:
            raise RequestError("memory and prompt_cache_bytes must be at least 0")
        self.cache = PromptCache(prompt_cache_bytes)
        self.keep_trunk = keep_trunk
        self._batch = Batch()
        self._waiting: deque[Task] = deque()
        self._running: dict[Task, _Running] = {}
        # Rounded copies used for drafting; they live as long as their models.
        self._prefixes: WeakSet[RoundedPrefix] = WeakSet()
        self._prompt_tokens = self._generation_tokens = 0
        self._prompt_time = self._generation_time = 0.0

    def __len__(self) -> int:
        """How many tasks have not ended."""
        return len(self._waiting) + len(self._running)

    @property
    def stats(self) -> Stats:
        """The current figures."""
        return Stats(
            self._prompt_tokens,
            self._generation_tokens,
            self._prompt_time,
            self._generation_time,
            len(self._running),
            len(self._waiting),
            self.cache.hits,
            self.cache.misses,
            self.cache.cached_tokens,
            len(self.cache),
            self.cache.nbytes,
            self._promised,
            self.memory,
        )

    def add(self, *tasks: Task) -> None:
        """Queue tasks: all of them, or none.

        Raises RequestError for a task that could never run.
        """
        for task in tasks:
            self.check(task)
        self._waiting.extend(tasks)

    def check(self, task: Task) -> None:
        """Raise RequestError for a task that needs more memory than the budget."""
        need, copies = self.bytes_needed(task), self._copies(task.mode)
        if need + copies > self.memory:
            rounded = f", with {_megabytes(copies)} of rounded stages" if copies else ""
            raise RequestError(
                f"{len(task.tokens)} tokens of prompt and {task.max_tokens} to generate may need "
                f"{_megabytes(need + copies)}{rounded}, but all sequences together may take "
                f"{_megabytes(self.memory)}: allow more memory, or fewer tokens"
            )

    def bytes_needed(self, task: Task, state: DecodingState | None = None) -> int:
        """The most bytes that the task's state can need, if it continues from `state`."""
        last, mode = task.model.poe_n_stages - 1, task.mode
        drafting = mode if isinstance(mode, Speculative) else None
        drafts = drafting.most if drafting else 0
        plain = mode.depth == mode.prefill_stage == last
        return state_bytes(
            task.model,
            len(task.tokens) + task.max_tokens + drafts,
            keep_trunk=self.keep_trunk,
            pending=0 if plain and not drafts else MAX_PENDING,
            spare=EXCESS if drafts or self.max_sequences > 1 else 0,
            chunk=task.step_size or prefill_step_size_here(),
            room=made_for(state) if state else 0,
            aside=drafting.prefix.of if drafting and drafting.prefix else (),
        )

    def _copies(self, *modes: Mode) -> int:
        """Bytes of the rounded copies used so far, and of those that `modes` need."""
        new = (mode.prefix for mode in modes if isinstance(mode, Speculative))
        prefixes = [*self._prefixes, *(prefix for prefix in new if prefix)]
        arrays = {id(array): array for prefix in prefixes for array in prefix.arrays}
        return sum(array.nbytes for array in arrays.values())

    def cancel(self, task: Task) -> None:
        """End a task, running or waiting; do nothing if it has ended. What it read stays cached."""
        if task in self._running:
            self._batch.remove(task)
            self._finish(self._running[task])
        elif task in self._waiting:
            self._waiting.remove(task)

    def close(self) -> None:
        """End all tasks and free all memory."""
        self._waiting.clear()
        self._batch.close()
        self._running.clear()
        self.cache.shrink(0)

    def step(self) -> list[Update]:
        """Work until there are updates, for at most one sweep of the batch."""
        started = time.perf_counter()
        updates = self._admit()
        before = [
            (running, running.state.positions_run[0], running.responses.count > 0)
            for running in self._running.values()
        ]
        events = self._batch.run()
        # A sequence may have produced more tokens than its reply has.
        ended = {event.name for event in events if not event.token}
        for event in events:
            running = self._running.get(event.name)  # type: ignore[call-overload]
            if running is None:
                continue
            if event.token:
                response = running.responses.add(event.token)
                self._generation_tokens += 1
                if running.responses.count == 1:
                    self._prompt_tokens += response.prompt_tokens
                over = response.finish_reason is not None
                updates.append(Update(running.task, response, ended=over))
                if over:
                    if running.task not in ended:
                        self._batch.remove(running.task)
                    self._finish(running)
            else:
                self._running.pop(running.task)
                error = event.error or RuntimeError("the sequence ended before its reply did")
                updates.append(Update(running.task, error=error, ended=True))
        self._charge(time.perf_counter() - started, before)
        for running in self._running.values():
            running.state.compact(EXCESS)
        return updates

    @property
    def _free(self) -> int:
        """Bytes that no running sequence may come to need, free for cached prompts."""
        return self.memory - self._promised - self._copies()

    @property
    def _promised(self) -> int:
        return sum(running.need for running in self._running.values())

    def _admit(self) -> list[Update]:
        """Start waiting tasks in order, as far as slots and memory allow."""
        updates = []
        while self._waiting and len(self._running) < self.max_sequences:
            task = self._waiting[0]
            if self._promised + self.bytes_needed(task) > self.memory - self._copies(task.mode):
                break
            self._waiting.popleft()
            try:
                self._start(task)
            except Exception as error:
                self._running.pop(task, None)
                updates.append(Update(task, error=error, ended=True))
            self.cache.shrink(self._free)
        return updates

    def _start(self, task: Task) -> None:
        running = [other.state for other in self._running.values()]
        if isinstance(task.mode, Speculative) and task.mode.prefix:
            self._prefixes.add(task.mode.prefix)
        free = self._free
        found = None
        if not task.asked.prompt_logprobs:
            found = self.cache.find(
                task.model,
                task.tokens,
                task.mode.depth,
                running,
                # A state that has grown long may be too large for a short task.
                lambda state: self.bytes_needed(task, state) <= free,
            )
        state = found.state if found else DecodingState(task.model, keep_trunk=self.keep_trunk)
        need = self.bytes_needed(task, state)
        pace = task.pace
        sequence = DecodingSequence(
            task.model,
            task.tokens,
            task.mode,
            max_tokens=task.max_tokens,
            sampler=Sampler(task.asked.sampling),
            state=state,
            prefill_step_size=task.step_size,
            progress=lambda *_: state.compact(EXCESS),
            advice=pace,
            fallback=make_mode(task.model),
            last_resort=last_resort(task.model),
            constraint=task.asked.grammar.start() if task.asked.grammar else None,
            score_prompt=task.asked.prompt_logprobs,
            special=self.tokenizer.special_ids,
        )
        cached = found.length if found else 0
        responses = Responses(self.tokenizer, sequence, task.stop, pace, cached)
        self._running[task] = _Running(task, state, sequence, responses, need)
        self._batch.add(task, self._steps(task, sequence), pace)

    def _steps(self, task: Task, sequence: DecodingSequence) -> Steps:
        """Read the prompt up to each mark and keep the state, then run the sequence's own steps."""
        state, mode, size = sequence.state, task.mode, task.step_size
        for mark in sorted(task.asked.marks):
            if state.length + LEAST <= mark < len(task.tokens):
                yield from ready(state, mode.depth, size)
                rest = task.tokens[state.length : mark]
                yield from read_prompt(state, rest, mode.prefill_stage, size, sequence.progress)
                self._keep(state.fork())
        yield from sequence.steps()

    def _finish(self, running: _Running) -> None:
        """End a reply: roll its state back to the reply's end and keep it for the next turn."""
        del self._running[running.task]
        state = running.state
        end = len(running.task.tokens) + running.responses.count
        if state.length > end:
            state.rollback(end)
        self._keep(state)

    def _keep(self, state: DecodingState) -> None:
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


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
