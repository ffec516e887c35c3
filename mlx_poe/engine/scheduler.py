"""Many prompts over time: which run together, how much memory they use, what they share.

- in: tasks, first come, first served
- out: for each task, a response per token, then its end
- a task starts once there is a slot and enough memory for the most it may need; cached prompts,
  and rounded copies that no running task drafts with, make room for it
- a task can pause: it gives up its slot and its memory, and goes on later
- synchronous, for one thread; `Engine` and `batch_generate` are built on it
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from weakref import WeakSet

from cognica_mlx.decoding.batch import Batch, Event
from cognica_mlx.decoding.footprint import state_bytes
from cognica_mlx.decoding.modes import last_resort, make_mode
from cognica_mlx.decoding.requests import DecodedToken, Resumable, Steps
from cognica_mlx.decoding.rounded_prefix import RoundedPrefix
from cognica_mlx.decoding.sampling import Sampler
from cognica_mlx.decoding.sequence import (
    DecodingSequence,
    prefill_step_size_here,
    read_prompt,
    ready,
)
from cognica_mlx.decoding.speculative import Speculative
from cognica_mlx.decoding.state import MAX_PENDING, DecodingState
from cognica_mlx.errors import RequestError
from cognica_mlx.files.byte_sizes import byte_size, size_text
from mlx_poe.engine.memory import memory_for_states
from mlx_poe.generation.prompt_cache import LEAST, PromptCache
from mlx_poe.generation.responses import GenerationResponse, Responses
from mlx_poe.generation.task import Stats, Task, Update
from mlx_poe.loading.tokenizer import Tokenizer

MAX_SEQUENCES = 8
# Copy a state's activations once their arrays hold this many positions of other sequences.
EXCESS = 256


@dataclass(eq=False)
class _Running:
    """A task that has begun. `over`: its reply is complete."""

    task: Task
    sequence: DecodingSequence
    responses: Responses
    need: int = 0
    over: bool = False

    @property
    def state(self) -> DecodingState:
        return self.sequence.state

    def tell(self, token: DecodedToken) -> GenerationResponse | None:
        """The response to a token; None after the reply's end."""
        if self.over:
            return None
        response = self.responses.add(token)
        self.over = response.finish_reason is not None
        return response


class Scheduler:
    """Runs tasks, `max_sequences` at a time.

    `memory` is the most bytes for states and cached prompts together (default:
    `memory_for_states()`), `prompt_cache_bytes` the most for cached prompts (default: a quarter of
    it); both may be text, such as "8GB". `keep_trunk` is passed to the states: if several models
    over one base are served, twice the base's `sequence_len` lets them share what it has read.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_sequences: int = MAX_SEQUENCES,
        memory: int | str | None = None,
        prompt_cache_bytes: int | str | None = None,
        keep_trunk: int = 0,
    ):
        if max_sequences < 1:
            raise RequestError(f"max_sequences {max_sequences} must be at least 1")
        self.tokenizer, self.max_sequences = tokenizer, max_sequences
        self.memory = memory_for_states() if memory is None else byte_size(memory)
        cached = self.memory // 4 if prompt_cache_bytes is None else byte_size(prompt_cache_bytes)
        self.cache = PromptCache(cached)
        self.keep_trunk = keep_trunk
        self._batch = Batch()
        self._waiting: deque[Task] = deque()
        self._running: dict[Task, _Running] = {}
        # Tasks that have begun but are not running, and those that may not start.
        self._begun: dict[Task, _Running] = {}
        self._paused: set[Task] = set()
        # Kept from call to call: an interruption must not lose any.
        self._events: deque[Event] = deque()
        self._updates: list[Update] = []
        # Rounded copies in memory.
        self._prefixes: WeakSet[RoundedPrefix] = WeakSet()
        self._prompt_tokens = self._generation_tokens = 0
        self._prompt_time = self._generation_time = 0.0

    def __len__(self) -> int:
        """How many tasks have not ended, or ended without an update so far; not those paused."""
        untold = sum(update.ended for update in self._updates)
        return len(self._waiting) + len(self._running) + untold

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
            len(self._paused),
            _bytes(self._prefixes),
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
        need, copies = self.bytes_needed(task), _bytes(task.prefixes)
        if need + copies > self.memory:
            rounded = f", with {size_text(copies)} of rounded stages" if copies else ""
            raise RequestError(
                f"{len(task.tokens)} tokens of prompt and {task.max_tokens} to generate may need "
                f"{size_text(need + copies)}{rounded}, but all sequences together may take "
                f"{size_text(self.memory)}: allow more memory, or fewer tokens"
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
            start=state,
            aside=drafting.prefix.of if drafting and drafting.prefix else (),
        )

    def cancel(self, task: Task) -> None:
        """End a task, running or waiting; do nothing if it has ended. What it read stays cached."""
        if task in self._running:
            self._finish(self._running[task])
        self._forget(task)

    def pause(self, task: Task) -> None:
        """Take a task's slot and memory away until `resume`; do nothing if it has ended. What it
        read stays cached, as long as there is room, and its reply goes on where it was."""
        running = self._running.get(task)
        if running and not running.over:
            self._paused.add(task)
            self._begun[task] = running
            self._finish(running)
        elif task in self._waiting:
            self._paused.add(task)
            self._waiting.remove(task)

    def resume(self, task: Task) -> None:
        """Let a paused task go on, before all that wait; do nothing if it is not paused."""
        if task in self._paused:
            self._paused.remove(task)
            self._waiting.appendleft(task)

    def close(self) -> None:
        """End all tasks and free their memory, and that of cached prompts."""
        for tasks in (self._waiting, self._begun, self._paused, self._events, self._updates):
            tasks.clear()
        self._batch.close()
        self._running.clear()
        self.cache.shrink(0)

    def step(self) -> list[Update]:
        """Work until there are updates, for at most one sweep of the batch. An interruption loses
        none: the next call continues."""
        started = time.perf_counter()
        self._admit()
        before = [
            (running, running.state.positions_run[0], running.responses.count > 0)
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
        updates, self._updates = self._updates, []
        return updates

    def _hear(self, event: Event) -> None:
        """Make an update of an event, unless its task was canceled or its reply is complete."""
        task, response = event.name, event.token
        assert isinstance(task, Task)
        running = self._running.get(task) or self._begun.get(task)
        if running is None:
            return
        if response:
            self._generation_tokens += 1
            if response.generation_tokens == 1:
                self._prompt_tokens += response.prompt_tokens
            over = response.finish_reason is not None
            self._updates.append(Update(task, response, ended=over))
        elif not running.over:
            self._forget(task)
            error = event.error or RuntimeError("the sequence ended before its reply did")
            self._updates.append(Update(task, error=error, ended=True))

    def _forget(self, task: Task) -> None:
        """Drop a task that has ended, wherever it is."""
        self._running.pop(task, None)
        self._begun.pop(task, None)
        self._paused.discard(task)
        if task in self._waiting:
            self._waiting.remove(task)

    @property
    def _free(self) -> int:
        """Bytes that no running sequence may come to need, free for cached prompts."""
        return self.memory - self._promised - _bytes(self._prefixes)

    @property
    def _promised(self) -> int:
        return sum(running.need for running in self._running.values())

    def _admit(self) -> None:
        """Start waiting tasks in order, as far as slots and memory allow."""
        while self._waiting and len(self._running) < self.max_sequences:
            task = self._waiting[0]
            if task not in self._running:  # it is if an interruption came right after its start
                if not self._make_room(task):
                    break
                try:
                    self._start(task)
                except BaseException as error:
                    self._running.pop(task, None)
                    self._batch.remove(task)
                    if not isinstance(error, Exception):
                        raise
                    self._begun.pop(task, None)
                    self._updates.append(Update(task, error=error, ended=True))
            self._waiting.popleft()
            self.cache.shrink(self._free)

    def _make_room(self, task: Task) -> bool:
        """Whether a task fits beside those that run, if need be without the rounded copies that
        none of them drafts with; those then give their memory back."""
        used = task.prefixes.union(*(other.prefixes for other in self._running))
        room = self.memory - self._promised - self.bytes_needed(task)
        if room < _bytes({*self._prefixes, *used}):
            if room < _bytes(used):
                return False
            keys = {key for prefix in used for key in prefix.sizes}
            for prefix in {*self._prefixes} - used:
                prefix.release(but=keys)
                self._prefixes.remove(prefix)
        return True

    def _start(self, task: Task) -> None:
        self._prefixes.update(task.prefixes)
        begun, free, found = self._begun.get(task), self._free, None
        if begun or not task.asked.prompt_logprobs:
            found = self.cache.find(
                task.model,
                begun.sequence.text if begun else task.tokens,
                task.mode.depth,
                [other.state for other in self._running.values()],
                # A state that has grown long may be too large for a short task.
                lambda state: self.bytes_needed(task, state) <= free,
            )
        state = found.state if found else DecodingState(task.model, keep_trunk=self.keep_trunk)
        running = begun or self._begin(task, state, found.length if found else 0)
        running.sequence.state, running.need = state, self.bytes_needed(task, state)
        self._running[task] = running
        steps = Resumable(partial(self._steps, running))
        self._batch.add(task, steps, task.pace, running.tell)
        self._begun.pop(task, None)

    def _begin(self, task: Task, state: DecodingState, cached: int) -> _Running:
        sequence = DecodingSequence(
            task.model,
            task.tokens,
            task.mode,
            max_tokens=task.max_tokens,
            sampler=Sampler(task.asked.sampling),
            state=state,
            prefill_step_size=task.step_size,
            progress=lambda *_: sequence.state.compact(EXCESS),
            advice=task.pace,
            fallback=make_mode(task.model),
            last_resort=last_resort(task.model),
            constraint=task.asked.grammar.start() if task.asked.grammar else None,
            score_prompt=task.asked.prompt_logprobs,
            special=self.tokenizer.special_ids,
        )
        responses = Responses(self.tokenizer, sequence, task.stop, task.pace, cached)
        return _Running(task, sequence, responses)

    def _steps(self, running: _Running) -> Steps:
        """Read the prompt up to each mark and keep the state, then run the sequence's own steps."""
        task, sequence, state = running.task, running.sequence, running.state
        for mark in sorted(task.asked.marks):
            if state.length + LEAST <= mark < len(task.tokens):
                yield from ready(state, task.mode.depth, task.step_size)
                rest = task.tokens[state.length : mark]
                depth = task.mode.prefill_stage
                yield from read_prompt(state, rest, depth, task.step_size, sequence.progress)
                self._keep(state.fork())
        yield from sequence.steps()

    def _finish(self, running: _Running) -> None:
        """Take a task out of the batch: roll its state back to the end of its text and keep it, for
        the next turn or until it is resumed."""
        self._batch.remove(running.task)
        del self._running[running.task]
        state, task = running.state, running.task
        running.sequence.state = DecodingState(task.model)  # the other is the cache's from now on
        end = len(task.tokens) + running.responses.count
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


def _bytes(prefixes: Collection[RoundedPrefix]) -> int:
    """What rounded copies take; they may share matrices."""
    return sum({key: size for prefix in prefixes for key, size in prefix.sizes.items()}.values())
