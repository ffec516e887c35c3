"""A pass over buffers of fixed shape, which a trace can replay.

A pass that adds a few rows to buffers with room for them needs no Python number: where rows go and
what they see is in arrays. What is left, a `PartKey` for each
part, changes only when a buffer grows or the stretch
of it that is seen moves on, so the same trace serves all passes in between.

- a *part* is some positions of one cache, or one position of each slot of a shelf; a pass has one
  or more
- rows are laid out as texts of one position, (N, 1)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from cognica_mlx.backend.kernels import as_mask, attention
from cognica_mlx.cache.hidden import Hidden
from cognica_mlx.cache.keys_and_values import Done

# A layer sees a stretch of its buffer that begins and ends at multiples of STRIDE.
STRIDE = 128


class Reach(NamedTuple):
    """What the layers of one window see of their buffers of `size` rows: `seen` from `first`."""

    window: int
    size: int
    first: int
    seen: int


class PartKey(NamedTuple):
    """What tells the graphs of two parts apart. `aligned`: all slots write the same row."""

    slots: int
    rows: int
    aligned: bool
    reaches: tuple[Reach, ...]


class Part(Protocol):
    """Positions to add to one cache, or to each slot of a shelf."""

    @property
    def key(self) -> PartKey: ...

    @property
    def positions(self) -> tuple[int, ...]:
        """Each row's position."""

    @property
    def ends(self) -> dict[int, tuple[int, ...]]:
        """By window, the row of its buffer that each row goes to."""

    @property
    def starts(self) -> Sequence[int]:
        """Where each cache's rows begin in this part."""

    @property
    def count(self) -> int:
        """How many rows there are of each cache."""

    def buffers(self) -> list[mx.array]:
        """Each layer's keys and values, (slots, KV, size, head_dim)."""

    def done(self, buffers: Sequence[mx.array]) -> list[Done]:
        """What to commit to each cache, given the new buffers."""


def reach(window: int, size: int, ends: Sequence[int], positions: Sequence[int]) -> Reach:
    """What rows that go to `ends` see, which is up to `window` rows before them."""
    low = min([end - min(at, window) for end, at in zip(ends, positions, strict=True)])
    high = max(ends) + 1
    # As many as any rows so close together may see, so that few stretches are in use.
    most = window + high - min(ends) + STRIDE - 1
    most = -(-most // (STRIDE // 2)) * (STRIDE // 2)
    first = max(min(low // STRIDE * STRIDE, size - most), 0)
    return Reach(window, size, first, min(most, size))


class FixedPass:
    """A plan for one pass, and its place in the arrays of a trace."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = tuple(parts)
        self.key = tuple([part.key for part in parts])
        windows = [r.window for r in self.key[0].reaches]
        positions = tuple([p for part in parts for p in part.positions])
        self.rows = len(positions)
        # Each row's position (N,), and for each window what to add for the row of the buffer that
        # it goes to; uint32.
        self.numbers = [_positions(positions)]
        for window in windows:
            ends = [end for part in parts for end in part.ends[window]]
            shifts = tuple([end - at for end, at in zip(ends, positions, strict=True)])
            self.numbers.append(_shifts(shifts))

    def buffers(self) -> list[mx.array]:
        """All buffers, part by part."""
        return [array for part in self.parts for array in part.buffers()]

    @cached_property
    def starts(self) -> list[int]:
        """The row at which each cache's positions begin."""
        starts, total = [], 0
        for part in self.parts:
            starts += [total + start for start in part.starts]
            total += part.key.rows
        return starts

    def spread(self, hidden: Hidden) -> Hidden:
        """The positions of `hidden`, one cache's after the other, in the rows of this pass."""
        counts = [part.count for part in self.parts for _ in part.starts]
        return spread(hidden, self.rows, self.starts, counts)

    def done(self, buffers: Sequence[mx.array]) -> list[Done]:
        """What to commit to each cache, in order, given all new buffers."""
        found: list[Done] = []
        share = len(buffers) // len(self.parts)
        for i, part in enumerate(self.parts):
            found += part.done(buffers[i * share : (i + 1) * share])
        return found


def spread(hidden: Hidden, rows: int, starts: Sequence[int], counts: Sequence[int]) -> Hidden:
    """The positions of `hidden` in so many rows: those of each cache, `counts` of them, from its
    start."""
    if rows == len(hidden):
        return hidden
    at, first = np.zeros(rows, np.int32), 0
    for start, count in zip(starts, counts, strict=True):
        at[start : start + count] = range(first, first + count)
        first += count
    return hidden.take(mx.array(at))


# Usually all stages ask for the same positions.
@lru_cache(maxsize=16)
def _positions(positions: tuple[int, ...]) -> mx.array:
    return mx.array(np.array(positions, np.uint32))


# The same from pass to pass, until rows move.
@lru_cache(maxsize=256)
def _shifts(shifts: tuple[int, ...]) -> mx.array:
    return mx.array(np.array(shifts).astype(np.uint32))  # below 0 it wraps, as sums do


class FixedAttention:
    """The `AttentionCache` of all layers in a `FixedPass`, made of its key and arrays."""

    def __init__(
        self,
        key: Sequence[PartKey],
        windows: Sequence[int],
        numbers: Sequence[mx.array],
        buffers: Sequence[mx.array],
    ):
        kinds = [r.window for r in key[0].reaches]
        self.offset = numbers[0]
        self._parts: list[tuple[slice, _Part]] = []
        start, share = 0, 2 * len(windows)
        for i, part in enumerate(key):
            rows = slice(start, start + part.rows)
            at, *shifts = [n if len(key) == 1 else n[rows] for n in numbers]
            by_window = dict(zip(kinds, shifts, strict=True))
            held = buffers[i * share : (i + 1) * share]
            self._parts.append((rows, _Part(part, windows, at, by_window, held)))
            start += part.rows

    def next_stage(self, windows: Sequence[int], buffers: Sequence[mx.array]) -> FixedAttention:
        """The same rows in another stage, with the same numbers: masks are shared."""
        other = copy.copy(self)
        share = 2 * len(windows)
        other._parts = [
            (rows, part.next_stage(windows, buffers[i * share : (i + 1) * share]))
            for i, (rows, part) in enumerate(self._parts)
        ]
        return other

    def attend(self, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        """See `AttentionCache`; each call is for the next layer."""
        if len(self._parts) == 1:
            return self._parts[0][1].attend(q, k, v, scale)
        outs = [part.attend(q[r], k[r], v[r], scale) for r, part in self._parts]
        return mx.concatenate(outs)

    def buffers(self) -> list[mx.array]:
        """All new buffers, once all layers have attended."""
        return [array for _, part in self._parts for array in part.made]


class _Part:
    def __init__(
        self,
        key: PartKey,
        windows: Sequence[int],
        at: mx.array,
        shifts: dict[int, mx.array],
        buffers: Sequence[mx.array],
    ):
        self._key, self._windows, self._buffers = key, windows, buffers
        self._at, self._ends = at, {w: at + shift for w, shift in shifts.items()}
        self._reaches = {r.window: r for r in key.reaches}
        # Several positions of one cache are a text of several positions.
        self._text = key.slots == 1 and key.rows > 1
        self._masks: dict[int, mx.array] = {}
        self._starts: dict[int, mx.array] = {}
        self.made: list[mx.array] = []

    def next_stage(self, windows: Sequence[int], buffers: Sequence[mx.array]) -> _Part:
        """See `FixedAttention`."""
        other = copy.copy(self)
        other._windows, other._buffers, other.made = windows, buffers, []
        return other

    def attend(self, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        """See `AttentionCache`: q (rows, H, 1, head_dim)."""
        window = self._windows[len(self.made) // 2]
        reach = self._reaches[window]
        if self._text:
            q, k, v = (x.transpose(2, 1, 0, 3) for x in (q, k, v))
        seen = []
        for new in (k, v):
            written = self._write(self._buffers[len(self.made)], new, window)
            self.made.append(written)
            whole = reach.seen == reach.size
            stop = reach.first + reach.seen
            seen.append(written if whole else written[:, :, reach.first : stop])
        if window not in self._masks:
            self._masks[window] = self._mask(reach, q, k.shape[1])
        out = attention(q, seen[0], seen[1], scale, self._masks[window])
        return out.transpose(2, 1, 0, 3) if self._text else out

    def _write(self, buffer: mx.array, new: mx.array, window: int) -> mx.array:
        """The buffer with the new rows."""
        ends = self._ends[window]
        if window not in self._starts:
            if self._key.aligned:
                self._starts[window] = ends if self._key.rows == 1 else ends[:1]
            else:
                self._starts[window] = ends.reshape(-1, 1, 1, 1)
        where = self._starts[window]
        if self._key.aligned:
            return mx.slice_update(buffer, new, where, (2,))
        return mx.put_along_axis(buffer, mx.broadcast_to(where, new.shape), new, axis=2)

    def _mask(self, reach: Reach, q: mx.array, kv_heads: int) -> mx.array:
        shape = (1, 1, -1, 1) if self._text else (-1, 1, 1, 1)
        before = mx.minimum(self._at, mx.array(reach.window, mx.uint32)).reshape(shape)
        ends = self._ends[reach.window].reshape(shape)
        # How long before its own row each row of the buffer was; after it, a huge number.
        age = ends - _rows(reach.first, reach.seen)
        return as_mask(age <= before, q.dtype, q.shape, kv_heads)


@lru_cache(maxsize=256)
def _rows(first: int, count: int) -> mx.array:
    return mx.array(np.arange(first, first + count, dtype=np.uint32))
