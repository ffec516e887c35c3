"""The decoding state: one token sequence, filled to a different depth in every stage.

    stage 0  ■■■■■■■■■■■■■■■■      filled to 16
    stage 1  ■■■■■■■■■■■··         filled to 11, 5 pending
    stage 2  ■■■■■■■■              filled to 8

- it holds the tokens, the caches and the activations pending between stages; it runs nothing: a
  driver takes what is pending before a stage, runs it, and puts the result back
- bounded: each layer keeps its window plus a slack, each boundary its pending rows plus a slack
- `rollback` returns every stage to a position, in full or not at all
- it knows nothing about sampling, modes or text; one sequence (B = 1), used by one reply at a time

A state can move to another model over the same base (`switch`): stages that both share keep what
they computed. For this, the base's last `keep_trunk` output activations are kept.

Stages deeper than `depth` are not kept ready: when more than `max_pending` positions wait before
such a stage, the oldest are dropped, and the stage must be filled from the text again. With up to
`max_pending` pending positions, a deeper stage catches up in one pass. Stages within `depth` must
catch up at that limit: `overdue` names the first that must.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from cognica_mlx.cache.hidden import Boundary, Hidden, Rows, pack
from cognica_mlx.cache.keys_and_values import Done, KeysAndValues
from cognica_mlx.errors import RequestError, RollbackError
from cognica_mlx.network.model import PoEModel
from cognica_mlx.network.shared_base import shared_stages
from cognica_mlx.network.stages import Stage

SLACK = 128
MAX_PENDING = 256
# Activations that are no longer needed are dropped at least this many positions at a time.
FORGET = 16
# When twice this many token arrays are unread, the host reads this many.
UNREAD = 128

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Text:
    """Tokens (1, T) to embed, and the one before them (1, 1), or None at the start of a text."""

    tokens: mx.array
    previous: mx.array | None


class DecodingState:
    """Keys, values, pending activations and tokens of one sequence under one model.

    `slack` positions can always be rolled back, counted from the furthest position reached; up to
    `max_pending` positions may wait before a stage. The base's output for the last `keep_trunk`
    positions is kept for specialists other than this model's. `depth` is the deepest stage that is
    kept ready. `positions_run[k]` counts the positions that have gone through stage k, including
    those rolled back later.
    """

    def __init__(
        self,
        model: PoEModel,
        *,
        slack: int = SLACK,
        max_pending: int = MAX_PENDING,
        keep_trunk: int = 0,
        stages: Sequence[Stage] | None = None,
    ):
        """`stages` replace all of the model's own stages."""
        if slack < 1 or max_pending < 1:
            raise RequestError(f"slack {slack} and max_pending {max_pending} must be at least 1")
        self.model, self.stages = model, tuple(stages or model.stages)
        self.slack, self.max_pending, self.keep_trunk = slack, max_pending, keep_trunk
        self.depth = len(self.stages) - 1
        # For each stage, the stages that read its output.
        self._readers = [
            [k for k, other in enumerate(self.stages) if other.source == stage + 1]
            for stage in range(len(self.stages))
        ]
        # How many positions of each stage's output are always kept.
        trunk = len(model.config.stage_layers) - 1
        self._kept = [
            max(slack, keep_trunk) if stage == trunk else slack for stage in range(len(self.stages))
        ]
        self.positions_run = [0] * len(self.stages)
        self._user: dict[str, object] = {}
        self.clear()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """For as long as one reply, or one call, runs the text on. RequestError if another does."""
        me = object()
        # Within `try`, and by one operation: an interruption must not leave it in use for ever.
        try:
            if self._user.setdefault("", me) is not me:
                raise RequestError(
                    "the decoding state is in use by another reply: end that one, or close its"
                    " iterator, or give each its own state (DecodingState.fork copies one)"
                )
            yield
        finally:
            if self._user.get("") is me:
                del self._user[""]

    def renew_traces(self) -> None:
        """Drop traces of passes whose matrices have been replaced since they were made."""
        arrays: list[mx.array] = []
        for stage in self.stages:
            if stage.rank:
                return  # what other machines hold is not traced here
            arrays += stage.arrays()
            stage.traces.made_of(arrays)  # a trace may run through the stages before it
        self.model.traces.made_of(self.model.arrays_around())

    def clear(self) -> None:
        """Drop the text and everything computed from it."""
        self.caches: list[KeysAndValues] = [stage.new_cache(self.slack) for stage in self.stages]
        # Each stage's output.
        self.given = [Boundary() for _ in self.stages]
        # The text: ids on the host, then arrays that the host has not read yet.
        self._ids: list[int] = []
        self._late: list[mx.array] = []
        self._late_count = 0

    # The text

    @property
    def length(self) -> int:
        """Positions appended so far."""
        return len(self._ids) + self._late_count

    @property
    def tokens(self) -> list[int]:
        """The token ids appended so far. Waits for any that are still being computed."""
        self._read(len(self._late))
        return self._ids

    def _read(self, count: int) -> None:
        """Read the oldest `count` arrays of token ids as numbers; waits for them."""
        if count:
            late = self._late[:count]
            ids: list[int] = [i for tokens in late for i in tokens.reshape(-1).tolist()]  # type: ignore
            known, rest = self._ids + ids, self._late[count:]
            left = self._late_count - len(ids)
            self._ids, self._late, self._late_count = known, rest, left

    def append(self, tokens: Sequence[int] | mx.array) -> None:
        """Add tokens to the text: ids, or a (1, T) int array, which may still be unevaluated.

        Raises RequestError for ids outside the vocabulary.
        """
        if not isinstance(tokens, mx.array):
            self.model.check_ids(tokens)
            if not self._late:
                self._ids += tokens
                return
            tokens = mx.array([list(tokens)], dtype=mx.int32)
        if tokens.size:
            rest, count = [*self._late, tokens], self._late_count + tokens.shape[1]
            self._late, self._late_count = rest, count
        if len(self._late) > 2 * UNREAD:
            # Computed long ago; otherwise a long text would keep an array for every token.
            self._read(UNREAD)

    def _span(self, start: int, stop: int) -> mx.array:
        """The tokens at positions start .. stop - 1 as an array (1, T)."""
        known = len(self._ids)
        parts, last = [], self.length
        # From the end: requests are for recent positions.
        for tokens in reversed(self._late):
            first = last - tokens.shape[1]
            if last <= start:
                break
            if first < stop:
                whole = start <= first and last <= stop
                parts.append(tokens if whole else tokens[:, max(start - first, 0) : stop - first])
            last = first
        if start < known:
            parts.append(mx.array([self._ids[start : min(stop, known)]], dtype=mx.int32))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts[::-1], axis=1)

    # Passes

    @property
    def filled(self) -> list[int]:
        """How many positions have gone through each stage."""
        return [cache.offset for cache in self.caches]

    def pending(self, stage: int) -> int:
        """How many positions wait to be run through `stage`."""
        source = self.stages[stage].source
        reached = self.caches[source - 1].offset if source else self.length
        return reached - self.caches[stage].offset

    def take(self, stage: int, count: int) -> Text | list[Rows]:
        """The next `count` positions pending before `stage`: text, or activations in pieces.

        Raises RequestError for a stage that is not kept ready, or if some were dropped.
        """
        if stage > self.depth:
            raise RequestError(
                f"stage {stage} is deeper than the stages kept ready; call set_depth first"
            )
        start = self.caches[stage].offset
        source = self.stages[stage].source
        if source:
            given = self.given[source - 1]
            if count and given.start > start:
                raise RequestError(f"the input of stage {stage} has been dropped; call set_depth")
            return given.read(start, start + count)
        previous = self._span(start - 1, start) if start else None
        return Text(self._span(start, start + count), previous)

    def put(self, stage: int, rows: Rows, done: Done) -> None:
        """Store the output of `stage` for the positions that `take` returned.

        They count as not run until the cache commits, so an interruption loses nothing.
        """
        given, cache = self.given[stage], self.caches[stage]
        given.truncate(cache.offset)
        given.append(rows.compact())
        self.positions_run[stage] += len(rows)
        cache.commit(done)
        kept = self._kept[stage]
        if self.length - kept - given.start >= FORGET:
            self._forget(stage, kept)

    def _forget(self, stage: int, kept: int) -> None:
        """Drop the output of `stage`, except the last `kept` positions and those that other stages
        still need."""
        needed = self.caches[stage].offset
        for reader in self._readers[stage]:
            if reader <= self.depth or self.pending(reader) <= self.max_pending:
                needed = min(needed, self.caches[reader].offset)
        self.given[stage].forget_before(min(needed, self.length - kept))

    def overdue(self) -> int | None:
        """The first stage within `depth` that has more than `max_pending` positions pending."""
        for stage in range(1, self.depth + 1):
            if self.pending(stage) > self.max_pending:
                return stage
        return None

    def lacks(self, stage: int) -> bool:
        """Whether any of the positions pending before `stage` have been dropped."""
        source = self.stages[stage].source
        if not source or not self.pending(stage):
            return False
        return self.given[source - 1].start > self.caches[stage].offset

    def next_round(self) -> None:
        """Note that all passes so far have been computed, or will be before the next ones start."""
        for cache in self.caches:
            cache.next_round()

    def rows(self, stage: int, start: int, stop: int) -> list[Rows]:
        """The output of `stage` for positions start .. stop - 1, in pieces.

        Only the last `slack` positions and those that the next stage still needs are held.
        Raises RequestError for others.
        """
        given, end = self.given[stage], self.caches[stage].offset
        if not given.start <= start < stop <= end:
            raise RequestError(
                f"positions {start} to {stop - 1} at stage {stage}: "
                f"only {given.start} to {end - 1} are held"
            )
        return given.read(start, stop)

    def boundary(self, stage: int, start: int, stop: int) -> Hidden:
        """Like `rows`, in one piece: arrays (1, T, D)."""
        return pack(self.rows(stage, start, stop))

    # Rollback, switching and copies

    @property
    def earliest_rollback(self) -> int:
        """The earliest position other than 0 that `rollback` can return to."""
        return max(cache.earliest for cache in self.caches)

    def rollback(self, position: int) -> None:
        """Return to the state after the first `position` tokens, in every stage and in full.

        Raises RollbackError, changing nothing, if a layer no longer holds enough keys; position 0
        is always possible.
        """
        if not 0 <= position <= self.length:
            raise RollbackError(f"cannot return to position {position} of {self.length}")
        if position == 0:
            self.clear()
            return
        if position < self.earliest_rollback:
            raise RollbackError(
                f"cannot return to position {position} of {self.length}: "
                f"the windows have moved on; {self.earliest_rollback} is the earliest"
            )
        # From the deepest stage up, the text last: if this is interrupted, no stage is ahead of its
        # input.
        for cache, given in reversed([*zip(self.caches, self.given, strict=True)]):
            cache.rollback(min(position, cache.offset))
            given.truncate(position)
        late, count = list(self._late), self._late_count
        while late and len(self._ids) + count - late[-1].shape[1] >= position:
            count -= late.pop().shape[1]
        self._late, self._late_count = late, count
        if self.length > position:
            self._ids = self.tokens[:position]

    def switch(self, model: PoEModel) -> DecodingState:
        """A state of the same text under another model over the same base; this one is unchanged.

        Shared stages (`shared_stages`) keep what they computed. The next stage continues from their
        output, as far back as `keep_trunk` has kept it; if that is not enough, `lacks` is true and
        the text must be run again. If no stage is shared, the new state is empty.
        """
        count = shared_stages(self.model, model, self.tokens)
        other = DecodingState(
            model, slack=self.slack, max_pending=self.max_pending, keep_trunk=self.keep_trunk
        )
        if not count:
            return other
        other._ids = list(self.tokens)
        other.caches[:count] = [cache.fork() for cache in self.caches[:count]]
        other.given[:count] = [given.fork() for given in self.given[:count]]
        return other

    def aside(self, stages: Sequence[Stage], of: Sequence[int]) -> DecodingState:
        """A scratch state of the same text, in which `stages` replace this state's stages `of`.

        They see the keys and values that the stages `of` computed; all of the text must have gone
        through those. Nothing run in the scratch state changes this one, which should not run
        anything until the scratch state is dropped.
        """
        other = DecodingState(
            self.model, slack=self.slack, max_pending=self.max_pending, stages=stages
        )
        caches = [self.caches[k] for k in of]
        assert all(cache.offset == self.length for cache in caches), "positions are pending"
        other._ids = list(self.tokens)
        other.caches = [cache.aside() for cache in caches]
        for given in other.given:
            given.stop = self.length
        return other

    def fork(self) -> DecodingState:
        """An independent copy that shares the arrays."""
        other = self.switch(self.model)
        other.depth = self.depth
        other.positions_run = list(self.positions_run)
        return other

    def compact(self, excess: int = 0) -> None:
        """Copy activations at boundaries where they keep more than `excess` foreign positions in
        memory: rejected drafts, and rows of other sequences from the same passes. Does not wait."""
        over = [given for given in self.given if given.excess > excess]
        if over:
            mx.async_eval([array for given in over for array in given.compact()])

    def trim(self, shared: Container[int] = ()) -> None:
        """For a state that pauses: copy keys and values to buffers of just their size, unless these
        are `shared`, by id. Waits for the copies."""
        for cache in self.caches:
            if not any(id(array) in shared for array in cache.arrays()):
                cache.trim()

    def arrays(self) -> list[mx.array]:
        """All arrays held, each once, for evaluation."""
        found = [array for cache in self.caches for array in cache.arrays()]
        found += [a for given in self.given for hidden in given.sources() for a in hidden.arrays()]
        return list({id(array): array for array in found}.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the keys, values and activations held, without token ids on the host."""
        return sum(array.nbytes for array in self.arrays())
