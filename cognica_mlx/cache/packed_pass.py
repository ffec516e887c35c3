"""One pass through a stage for many sequences, with their rows packed one after another.

- caches on the same shelf write their rows together and attend in one operation
- the others attend one by one, each over its own buffers
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import mlx.core as mx
import numpy as np

from cognica_mlx.cache.keys_and_values import Done
from cognica_mlx.cache.shelf import Shelf, arrange, place_of
from cognica_mlx.cache.stage_cache import Content, Span, StageCache, StagePass


class ShelfPass:
    """One position from each of several caches on a shelf, in the order of their slots; serves as
    each layer's `AttentionCache`."""

    def __init__(self, caches: Sequence[StageCache]):
        self._contents = [cache.content for cache in caches]
        self._rounds = [cache.round for cache in caches]
        places = [place for cache in caches if (place := place_of(cache))]
        self._shelf = places[0].shelf
        slots = tuple([place.slot for place in places])
        offsets = tuple(self.positions())
        self.offset = _as_array(offsets)
        # Windows longer than every text hide nothing: clip them, so that they share a cache entry.
        longest = max(offsets)
        self._rows = {}
        for window in self._shelf.lengths:
            shifts = tuple([place.shifts[window] for place in places])
            self._rows[window] = _rows(slots, offsets, shifts, min(window, longest))
        self._layers: list[tuple[mx.array, mx.array]] = []

    def positions(self) -> list[int]:
        """The caches' next positions."""
        return [content.offset for content in self._contents]

    def attend(self, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        """See `AttentionCache`: here T is the number of caches, one position each."""
        i = len(self._layers)
        rows = self._rows[self._shelf.windows[i]]
        old_keys, old_values = self._shelf.layers[i]
        # (T, heads, 1, head_dim)
        q, k, v = (x.transpose(2, 1, 0, 3) for x in (q, k, v))
        keys, values = rows.write(old_keys, k), rows.write(old_values, v)
        self._layers.append((keys, values))
        outs = [
            mx.fast.scaled_dot_product_attention(
                q[run.members],
                keys[run.slots, :, run.seen],
                values[run.slots, :, run.seen],
                scale=scale,
                mask=run.mask,
            )
            for run in rows.runs
        ]
        out = outs[0] if len(outs) == 1 else mx.concatenate(outs)
        return out.transpose(2, 1, 0, 3)

    @cached_property
    def contents(self) -> list[Content]:
        """Each cache's content after this pass. The shelf gets the new rows first, which is safe: a
        cache ignores rows beyond its own."""
        self._shelf.layers = tuple(self._layers)
        found = []
        for old, written in zip(self._contents, self._rounds, strict=True):
            spans = {window: Span(span.rows + 1) for window, span in old.spans.items()}
            found.append(Content(old.offset + 1, spans, (), written, old.place))
        return found


class _Member:
    """One cache's part of a pass."""

    def __init__(self, shared: ShelfPass, i: int):
        self._shared, self._i = shared, i

    def result(self) -> Content:
        return self._shared.contents[self._i]


@dataclass(frozen=True)
class _Run:
    """Members in adjacent slots, the rows that any of them sees, and a mask (T, 1, 1, rows) if some
    see fewer."""

    members: slice
    slots: slice
    seen: slice
    mask: mx.array | None


@dataclass(frozen=True)
class _Rows:
    """Where a pass writes in the layers of one window, and what each run of adjacent slots sees.

    slots, rows: (T,) arrays. `same` is the row if all share it and the slots are adjacent.
    """

    slots: mx.array
    rows: mx.array
    same: int | None
    runs: tuple[_Run, ...]

    def write(self, array: mx.array, new: mx.array) -> mx.array:
        """The shelf's array with new rows (T, KV, 1, head_dim) written to T of its slots."""
        # A new array object, because item assignment changes the object in place.
        written = array[:]
        if self.same is not None:
            written[self.runs[0].slots, :, self.same : self.same + 1] = new
        else:
            written[self.slots, :, self.rows] = new[:, :, 0]
        return written


# Usually all stages ask for the same positions.
@lru_cache(maxsize=16)
def _as_array(positions: tuple[int, ...]) -> mx.array:
    return mx.array(positions)


@lru_cache(maxsize=16)
def _rows(
    slots: tuple[int, ...], offsets: tuple[int, ...], shifts: tuple[int, ...], window: int
) -> _Rows:
    """The `_Rows` of members in `slots`: member i writes position offsets[i] to row offsets[i] +
    shifts[i]."""
    rows = np.array(offsets) + shifts
    # The first row that each sees.
    first = rows - np.minimum(offsets, window)
    gaps = [i for i in range(1, len(slots)) if slots[i] != slots[i - 1] + 1]
    runs = []
    for start, stop in itertools.pairwise([0, *gaps, len(slots)]):
        members = slice(start, stop)
        low, high = int(first[members].min()), int(rows[members].max()) + 1
        at = np.arange(low, high)
        seen = (at >= first[members, None]) & (at <= rows[members, None])
        mask = None if seen.all() else mx.array(seen[:, None, None])
        runs.append(_Run(members, slice(slots[start], slots[stop - 1] + 1), slice(low, high), mask))
    alike = len(runs) == 1 and bool((rows == rows[0]).all())
    return _Rows(mx.array(slots), mx.array(rows), int(rows[0]) if alike else None, tuple(runs))


class PackedPass:
    """The passes of several caches as one, with their rows concatenated: (1, total, …)."""

    def __init__(self, passes: Sequence[ShelfPass | StagePass]):
        self._parts: list[tuple[slice, ShelfPass | StagePass]] = []
        positions: list[int] = []
        for part in passes:
            start = len(positions)
            positions += part.positions()
            self._parts.append((slice(start, len(positions)), part))
        self.offset = mx.array(positions, dtype=mx.int32)

    def attend(self, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        outs = [
            part.attend(q[:, :, rows], k[:, :, rows], v[:, :, rows], scale)
            for rows, part in self._parts
        ]
        return mx.concatenate(outs, axis=2)


def in_order(caches: Sequence[StageCache]) -> list[int]:
    """The order in which caches share a pass: each shelf's caches by slot, then the others."""
    rank: dict[Shelf, int] = {}
    keys = [
        (rank.setdefault(place.shelf, len(rank)), place.slot)
        if (place := place_of(cache))
        else (len(caches), 0)
        for cache in caches
    ]
    return sorted(range(len(caches)), key=keys.__getitem__)


def arranged(caches: Sequence[StageCache], counts: Sequence[int]) -> list[int]:
    """Let caches leave or join shelves before a pass of `counts` positions; returns the order in
    which to share it."""
    arrange(caches, counts)
    return in_order(caches)


def begin(
    caches: Sequence[StageCache], counts: Sequence[int]
) -> tuple[StagePass | ShelfPass | PackedPass, list[Done]]:
    """A pass of `counts` positions for the caches, which must be in the order of `in_order`: what
    the layers attend with, and each cache's part to commit."""
    shelves: dict[Shelf, list[StageCache]] = {}
    own: list[StagePass] = []
    for cache, count in zip(caches, counts, strict=True):
        if place := place_of(cache):
            shelves.setdefault(place.shelf, []).append(cache)
        else:
            own.append(cache.begin(count))
    together = [ShelfPass(members) for members in shelves.values()]
    # The pass must not refer to these: a cycle would keep its arrays alive, so MLX would copy them.
    parts: list[Done] = [
        _Member(shared, i) for shared in together for i in range(len(shared.positions()))
    ]
    passes: list[ShelfPass | StagePass] = [*together, *own]
    return passes[0] if len(passes) == 1 else PackedPass(passes), [*parts, *own]
