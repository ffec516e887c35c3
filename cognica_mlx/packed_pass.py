"""One pass through a stage for many sequences: whose rows follow each other, and what each sees.

- caches that stand on one shelf write their rows together and are attended together
- the others attend one by one, each over its own buffers
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import mlx.core as mx
import numpy as np

from cognica_mlx.cache import Content, Done, Span, StageCache, StagePass
from cognica_mlx.shelf import Shelf


class ShelfPass:
    """A position each of several caches on one shelf, in the order of their slots: their part of
    each layer's `AttentionCache`."""

    def __init__(self, caches: Sequence[StageCache]):
        self._contents = [cache.content for cache in caches]
        self._rounds = [cache.round for cache in caches]
        places = [content.place for content in self._contents]
        self._shelf: Shelf = places[0].shelf  # type: ignore[union-attr]
        slots = tuple([place.slot for place in places])  # type: ignore[union-attr]
        offsets = tuple(self.positions())
        self.offset = _as_array(offsets)
        # A window that is longer than all texts hides nothing: one answer for all such.
        longest = max(offsets)
        self._rows = {}
        for window in self._shelf.lengths:
            shifts = tuple([place.shifts[window] for place in places])  # type: ignore[union-attr]
            self._rows[window] = _rows(slots, offsets, shifts, min(window, longest))
        self._layers: list[tuple[mx.array, mx.array]] = []

    def positions(self) -> list[int]:
        """The caches' next positions."""
        return [content.offset for content in self._contents]

    def attend(self, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        """See `AttentionCache`: here T counts the caches, a position each."""
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
        """What each of the caches holds after this pass. Before any does, the shelf has the new
        rows: what is beyond a cache's own counts for nothing."""
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
        """See `Done`."""
        return self._shared.contents[self._i]


@dataclass(frozen=True)
class _Run:
    """Members in neighbouring slots, the rows that any of them sees, and a mask (T, 1, 1, rows)
    where some see fewer."""

    members: slice
    slots: slice
    seen: slice
    mask: mx.array | None


@dataclass(frozen=True)
class _Rows:
    """Where a pass writes in the layers of one window, and what each run of neighbours sees.

    slots, rows: (T,) arrays. `same` is the row if it is one for all, and the slots are neighbours.
    """

    slots: mx.array
    rows: mx.array
    same: int | None
    runs: tuple[_Run, ...]

    def write(self, array: mx.array, new: mx.array) -> mx.array:
        """The shelf's array with new rows (T, KV, 1, head_dim) in T of its slots."""
        # An array object of its own: item assignment changes the one that it is given.
        written = array[:]
        if self.same is not None:
            written[self.runs[0].slots, :, self.same : self.same + 1] = new
        else:
            written[self.slots, :, self.rows] = new[:, :, 0]
        return written


# Mostly all stages ask for the same.
@lru_cache(maxsize=16)
def _as_array(positions: tuple[int, ...]) -> mx.array:
    return mx.array(positions)


@lru_cache(maxsize=16)
def _rows(
    slots: tuple[int, ...], offsets: tuple[int, ...], shifts: tuple[int, ...], window: int
) -> _Rows:
    """For members in these slots whose next positions are `offsets`, in rows by so much later."""
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
    """The passes of several caches as one: rows (1, total, …) follow each other."""

    def __init__(self, passes: Sequence[ShelfPass | StagePass]):
        self._parts: list[tuple[slice, ShelfPass | StagePass]] = []
        positions: list[int] = []
        for part in passes:
            start = len(positions)
            positions += part.positions()
            self._parts.append((slice(start, len(positions)), part))
        self.offset = mx.array(positions, dtype=mx.int32)

    def attend(self, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        """See `AttentionCache`."""
        outs = [
            part.attend(q[:, :, rows], k[:, :, rows], v[:, :, rows], scale)
            for rows, part in self._parts
        ]
        return mx.concatenate(outs, axis=2)


def in_order(caches: Sequence[StageCache]) -> list[int]:
    """The order in which caches share a pass: each shelf's by their slots, then the others."""
    rank: dict[Shelf, int] = {}
    keys = [
        (rank.setdefault(place.shelf, len(rank)), place.slot)
        if (place := cache.content.place)
        else (len(caches), 0)
        for cache in caches
    ]
    return sorted(range(len(caches)), key=keys.__getitem__)


def begin(
    caches: Sequence[StageCache], counts: Sequence[int]
) -> tuple[StagePass | ShelfPass | PackedPass, list[Done]]:
    """A pass of so many positions for each of the caches, which are in the order of `in_order`:
    what the layers attend with, and each cache's part, to be committed."""
    shelves: dict[Shelf, list[StageCache]] = {}
    own: list[StagePass] = []
    for cache, count in zip(caches, counts, strict=True):
        if place := cache.content.place:
            shelves.setdefault(place.shelf, []).append(cache)
        else:
            own.append(cache.begin(count))
    together = [ShelfPass(members) for members in shelves.values()]
    # Not kept by the pass itself: in a cycle its arrays would outlive it, and be copied.
    parts: list[Done] = [
        _Member(shared, i) for shared in together for i in range(len(shared.positions()))
    ]
    passes: list[ShelfPass | StagePass] = [*together, *own]
    return passes[0] if len(passes) == 1 else PackedPass(passes), [*parts, *own]
