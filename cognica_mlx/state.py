"""The decoding state: one token sequence, filled to a different depth in every stage.

    stage 0  ■■■■■■■■■■■■■■■■      filled to 16
    stage 1  ■■■■■■■■■■■··         filled to 11, 5 pending
    stage 2  ■■■■■■■■              filled to 8

- it holds the text, the caches and the activations that wait between the stages; it runs nothing:
  a driver takes what is pending before a stage, runs it, and puts the result back
- bounded: each layer keeps its window and a slack, each boundary what is pending and a slack
- `rollback` returns every stage to a position, in full or not at all
- it knows nothing about sampling, modes or text; one sequence (B = 1)

A state can pass to another model over the same base (`switch`): what both compute alike is kept.
For that the activations where the base ends are held back as far as `keep_trunk` says.

Stages deeper than `depth` are not kept ready: when more than `max_pending` positions wait before
such a stage, the oldest are forgotten, and the stage has to be filled from the text again. Up to
`max_pending` positions a deeper stage catches up in one pass. Stages within `depth` must catch up
at that limit: `overdue` names them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from cognica_mlx.cache import Done
from cognica_mlx.errors import RequestError, RollbackError
from cognica_mlx.hidden import Boundary, Hidden, Rows, pack
from cognica_mlx.model import PoEModel
from cognica_mlx.shared_base import shared_stages
from cognica_mlx.stages import Stage

SLACK = 128
MAX_PENDING = 256
# Activations that nobody needs any more are dropped so many positions at a time, or more.
FORGET = 16
# Token arrays that may wait to be read by the host.
UNREAD = 128

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Text:
    """Tokens (1, T) to be embedded, and the one before them (1, 1), None where they open a text."""

    tokens: mx.array
    previous: mx.array | None


class DecodingState:
    """Keys, values, pending activations and tokens of one sequence under one model.

    `slack` positions can always be rolled back, counted from the furthest one reached;
    `max_pending` positions may wait before a stage. What the base gives out for the last
    `keep_trunk` positions stays at hand, for other specialists than this model's. `depth` is the
    deepest stage that is kept ready. `positions_run[k]` counts the positions that have gone through
    stage k, those later rolled back included.
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
        """`stages` run instead of the model's own first ones; there are no others then."""
        if slack < 1 or max_pending < 1:
            raise RequestError(f"slack {slack} and max_pending {max_pending} must be at least 1")
        self.model, self.stages = model, tuple(stages or model.stages)
        self.slack, self.max_pending, self.keep_trunk = slack, max_pending, keep_trunk
        self.depth = len(self.stages) - 1
        # The stages that take in what each gives out.
        self._readers = [
            [k for k, other in enumerate(self.stages) if other.source == stage + 1]
            for stage in range(len(self.stages))
        ]
        # Of what each gives out, the positions that stay at hand whoever needs them.
        trunk = len(model.config.stage_layers) - 1
        self._kept = [
            max(slack, keep_trunk) if stage == trunk else slack for stage in range(len(self.stages))
        ]
        self.positions_run = [0] * len(self.stages)
        self.clear()

    def clear(self) -> None:
        """Forget the text and all that was computed from it."""
        self.caches = [stage.new_cache(self.slack) for stage in self.stages]
        # What each stage has given out.
        self.given = [Boundary() for _ in self.stages]
        # The text: ids on the host, then arrays that it has not read yet.
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
        """The token ids appended so far. Waits for those still being computed."""
        self._read(len(self._late))
        return self._ids

    def _read(self, count: int) -> None:
        """Turn the oldest `count` arrays of token ids into numbers; waits for them."""
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
            self.check_ids(tokens)
            if not self._late:
                self._ids += tokens
                return
            tokens = mx.array([list(tokens)], dtype=mx.int32)
        if tokens.size:
            rest, count = [*self._late, tokens], self._late_count + tokens.shape[1]
            self._late, self._late_count = rest, count
        if len(self._late) > 2 * UNREAD:
            # Long since computed: without this a long text would keep an array for every token.
            self._read(UNREAD)

    def check_ids(self, tokens: Sequence[int]) -> None:
        """Raise RequestError for a token id outside the vocabulary."""
        size = self.model.config.vocab_size
        if not tokens or (min(tokens) >= 0 and max(tokens) < size):
            return
        token = next(token for token in tokens if not 0 <= token < size)
        raise RequestError(f"token id {token} is outside the vocabulary of {size}")

    def _span(self, start: int, stop: int) -> mx.array:
        """The tokens at positions start .. stop - 1 as an array (1, T)."""
        known = len(self._ids)
        parts, last = [], self.length
        # From the end: what is asked for is recent.
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
        reached = self.caches[source - 1].content.offset if source else self.length
        return reached - self.caches[stage].content.offset

    def take(self, stage: int, count: int) -> Text | list[Rows]:
        """The next `count` positions that wait before `stage`: text, or activations in pieces.

        Raises RequestError for a stage that is not kept ready, or that lacks some of them.
        """
        if stage > self.depth:
            raise RequestError(
                f"stage {stage} is beyond the depth kept ready; call set_depth first"
            )
        start = self.caches[stage].offset
        source = self.stages[stage].source
        if source:
            given = self.given[source - 1]
            if count and given.start > start:
                raise RequestError(
                    f"what waits before stage {stage} is no longer held; call set_depth"
                )
            return given.read(start, start + count)
        previous = self._span(start - 1, start) if start else None
        return Text(self._span(start, start + count), previous)

    def put(self, stage: int, rows: Rows, done: Done) -> None:
        """Take in what `stage` has made of the positions that `take` gave.

        Until the last line they count as not run, so that an interruption loses nothing.
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
        """Drop from what `stage` has given out all but the last `kept` positions, and those that
        other stages need."""
        needed = self.caches[stage].offset
        for reader in self._readers[stage]:
            if reader <= self.depth or self.pending(reader) <= self.max_pending:
                needed = min(needed, self.caches[reader].offset)
        self.given[stage].forget_before(min(needed, self.length - kept))

    def overdue(self) -> int | None:
        """A stage within `depth` before which more than `max_pending` positions wait."""
        for stage in range(1, self.depth + 1):
            if self.pending(stage) > self.max_pending:
                return stage
        return None

    def lacks(self, stage: int) -> bool:
        """Whether positions that `stage` has not run are no longer held before it."""
        source = self.stages[stage].source
        if not source or not self.pending(stage):
            return False
        return self.given[source - 1].start > self.caches[stage].offset

    def next_round(self) -> None:
        """All passes so far have been computed, or will be before the next ones start."""
        for cache in self.caches:
            cache.next_round()

    def rows(self, stage: int, start: int, stop: int) -> list[Rows]:
        """What `stage` gave out for positions start .. stop - 1, in pieces.

        Held are those that the next stage still needs and the last `slack` positions.
        Raises RequestError for others.
        """
        given, end = self.given[stage], self.caches[stage].offset
        if not given.start <= start < stop <= end:
            raise RequestError(
                f"positions {start} to {stop - 1} at stage {stage}: "
                f"held are {given.start} to {end - 1}"
            )
        return given.read(start, stop)

    def boundary(self, stage: int, start: int, stop: int) -> Hidden:
        """As `rows`, in one piece: (1, T, D) each."""
        return pack(self.rows(stage, start, stop))

    # Going back, and passing on

    @property
    def earliest_rollback(self) -> int:
        """The earliest position, 0 aside, that `rollback` can return to."""
        return max(cache.earliest for cache in self.caches)

    def rollback(self, position: int) -> None:
        """Return to the state after the first `position` tokens, in every stage and in full.

        Raises RollbackError, changing nothing, where a layer no longer holds what that needs;
        position 0 is always possible.
        """
        if not 0 <= position <= self.length:
            raise RollbackError(f"cannot return to position {position} of {self.length}")
        if position == 0:
            self.clear()
            return
        if position < self.earliest_rollback:
            raise RollbackError(
                f"cannot return to position {position} of {self.length}: "
                f"the windows have slid on, {self.earliest_rollback} is the earliest"
            )
        # From the deepest stage up, the text last: wherever this is interrupted, no stage is ahead
        # of what it takes in.
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
        """The same text under another model over the same base; this state stays as it is.

        The stages that compute alike in both (`shared_stages`) keep what they have. The next one
        takes up what they have given out, as far as `keep_trunk` has held it back; beyond that,
        `lacks` says that the text must be run again. Where no stage is alike, the new state is
        empty.
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
        """The same text for other versions of this state's stages `of`, to try positions out with.

        They see the keys and values that this state's own stages have made of the text, all of
        which must have gone through these. This state notices nothing of what is run there; it
        should not run anything itself before the other is let go.
        """
        other = DecodingState(
            self.model, slack=self.slack, max_pending=self.max_pending, stages=stages
        )
        caches = [self.caches[k] for k in of]
        assert all(cache.offset == self.length for cache in caches), "positions are pending"
        other._ids = list(self.tokens)
        for cache in caches:
            # Until the next round both write beside large buffers, as if they had been written
            # already: so neither has to copy one because of the other.
            cache.content = cache.content._replace(written=cache.round)
        other.caches = [cache.fork() for cache in caches]
        for given in other.given:
            given.stop = self.length
        return other

    def fork(self) -> DecodingState:
        """An independent copy: either may go on without the other noticing. Shares arrays."""
        other = self.switch(self.model)
        other.depth = self.depth
        other.positions_run = list(self.positions_run)
        return other

    def compact(self, excess: int = 0) -> None:
        """Hold activations in arrays of their own, at boundaries where they keep more than `excess`
        positions in memory that are not theirs: refused drafts, and rows of other sequences that
        were run together with these. Waits for nothing."""
        over = [given for given in self.given if given.excess > excess]
        if over:
            mx.async_eval([array for given in over for array in given.compact()])

    def leave_shelves(self) -> None:
        """Hold keys and values in buffers of its own, as for a state that does not go on for now.
        Waits for them."""
        for cache in self.caches:
            cache.leave()

    def arrays(self) -> list[mx.array]:
        """All arrays that are held, each once, for evaluation."""
        found = [array for cache in self.caches for array in cache.arrays()]
        found += [a for given in self.given for hidden in given.sources() for a in hidden.arrays()]
        return list({id(array): array for array in found}.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the keys, values and activations held. Token ids, on the host, not counted."""
        return sum(array.nbytes for array in self.arrays())
