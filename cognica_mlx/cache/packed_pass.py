"""One pass through a stage for many sequences, with their rows packed one after another.

- caches on the same shelf write their rows together and attend in one operation; the pass has a row
  for each slot, and what it holds for a slot that takes no part is never seen
- the others attend one by one, each over its own buffers
- if all buffers keep their shape, the pass can be replayed: see `fixed_pass`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from cognica_mlx.backend.kernels import FEW
from cognica_mlx.cache.fixed_pass import (
    FixedAttention,
    FixedPass,
    Part,
    PartKey,
    reach,
    spread,
)
from cognica_mlx.cache.hidden import Hidden
from cognica_mlx.cache.keys_and_values import Done
from cognica_mlx.cache.shelf import Shelf, arrange, place_of
from cognica_mlx.cache.stage_cache import Content, Layer, Span, StageCache, StagePass

# A pass of more parts than this is not replayed: there are too many ways to combine them.
PARTS = 4


class SlotsPart:
    """The `Part` of a pass for one position of several caches on a shelf, in the order of their
    slots; a row for each slot."""

    def __init__(self, caches: Sequence[StageCache]):
        places = [place for cache in caches if (place := place_of(cache))]
        self._caches, self._shelf = caches, places[0].shelf
        self.windows, self.count = self._shelf.windows, 1
        self.starts = [place.slot for place in places]
        self.positions = self._of_slots([cache.offset for cache in caches], 0)
        self.ends, reaches, aligned = {}, [], True
        for window, length in self._shelf.lengths.items():
            own = [
                cache.offset + place.shifts[window]
                for cache, place in zip(caches, places, strict=True)
            ]
            # Beyond the rows of a cache that sits out, its slot may be written to.
            ends = self.ends[window] = self._of_slots(own, max(own), window)
            aligned &= len(set(ends)) == 1
            reaches.append(reach(window, length, ends, self.positions))
        self.key = PartKey(len(self.positions), len(self.positions), aligned, tuple(reaches))

    def _of_slots(
        self, members: Sequence[int], others: int, window: int | None = None
    ) -> tuple[int, ...]:
        """The members' numbers in their slots, and for other slots `others`, or more if it is a row
        that belongs to a cache there."""
        if len(members) == len(self._shelf):
            return tuple(members)
        found = [others] * len(self._shelf)
        if window is not None:
            for cache in self._shelf.caches():
                if place := place_of(cache):
                    found[place.slot] = max(others, cache.offset + place.shifts[window])
        for slot, number in zip(self.starts, members, strict=True):
            found[slot] = number
        return tuple(found)

    def buffers(self) -> list[mx.array]:
        return [array for pair in self._shelf.layers for array in pair]

    def done(self, buffers: Sequence[mx.array]) -> list[Done]:
        """The shelf takes all new rows when the first cache commits, which is safe: a cache ignores
        rows beyond its own."""
        shared = _Written(self._shelf, buffers)
        return [_Member(shared, cache) for cache in self._caches]


class _Written:
    """A shelf's new arrays, which it takes when the first of its caches commits."""

    def __init__(self, shelf: Shelf, buffers: Sequence[mx.array]):
        self._shelf = shelf
        self._layers = [*zip(buffers[::2], buffers[1::2], strict=True)]

    def take(self) -> None:
        if self._layers:
            self._shelf.layers, self._layers = tuple(self._layers), []


class _Member:
    """One cache's part of a pass."""

    def __init__(self, shared: _Written, cache: StageCache):
        self._shared, self._content, self._round = shared, cache.content, cache.round

    def result(self) -> Content:
        self._shared.take()
        old = self._content
        spans = {window: Span(span.rows + 1) for window, span in old.spans.items()}
        return old._replace(offset=old.offset + 1, spans=spans, written=self._round)


class OnePart:
    """The `Part` of a pass for `count` positions of one cache."""

    starts = (0,)

    def __init__(self, cache: StageCache, count: int):
        self._cache, self.count = cache, count
        content = cache.content
        first = content.offset
        self.positions = tuple(range(first, first + count))
        self.ends, reaches = {}, []
        for window, span in content.spans.items():
            ends = self.ends[window] = tuple(range(span.rows, span.rows + count))
            reaches.append(reach(window, cache.size(window), ends, self.positions))
        self.key = PartKey(1, count, True, tuple(reaches))

    @staticmethod
    def fits(cache: StageCache, count: int) -> bool:
        """Whether the buffers have room, and may be written to."""
        content = cache.content
        if content.place or content.layers[0].keys is None:
            return False
        return all(
            not span.tail
            and span.rows + count <= cache.size(window)
            and not (content.written == cache.round and cache.is_large(window))
            for window, span in content.spans.items()
        )

    def buffers(self) -> list[mx.array]:
        return [array for layer in self._cache.content.layers for array in layer.arrays()[:2]]

    def done(self, buffers: Sequence[mx.array]) -> list[Done]:
        content, count = self._cache.content, self.count
        spans = {window: Span(span.rows + count) for window, span in content.spans.items()}
        layers = tuple(map(Layer, buffers[::2], buffers[1::2]))
        return [_Finished(Content(content.offset + count, spans, layers, self._cache.round))]


class _Finished(NamedTuple):
    """A finished pass."""

    content: Content

    def result(self) -> Content:
        return self.content


class PackedPass:
    """The passes of several caches as one, with their rows in a text: (1, N, …). Serves as the
    `AttentionCache` of all layers."""

    def __init__(self, together: Sequence[SlotsPart], own: Sequence[StagePass]):
        self._slots, self._passes = together, own
        self._parts: list[tuple[slice, FixedAttention | StagePass]] = []
        self.starts: list[int] = []
        positions: list[int] = []
        parts: list[SlotsPart | StagePass] = [*together, *own]
        for part in parts:
            start = len(positions)
            positions += part.positions
            self.starts += [start + own for own in part.starts]
            attention = _alone(part) if isinstance(part, SlotsPart) else part
            self._parts.append((slice(start, len(positions)), attention))
        self._counts = [part.count for part in parts for _ in part.starts]
        self.rows = len(positions)
        # One text: its first position is enough, and what it sees needs no array.
        one = own[0].offset if len(self._parts) == len(own) == 1 else None
        self.offset = mx.array(positions, dtype=mx.int32) if one is None else one

    def attend(self, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        outs = []
        for rows, part in self._parts:
            own = (q, k, v)
            if len(self._parts) > 1:
                own = (q[:, :, rows], k[:, :, rows], v[:, :, rows])
            if isinstance(part, FixedAttention):
                one, other, third = (x.transpose(2, 1, 0, 3) for x in own)
                outs.append(part.attend(one, other, third, scale).transpose(2, 1, 0, 3))
            else:
                outs.append(part.attend(*own, scale))
        return outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=2)

    def spread(self, hidden: Hidden) -> Hidden:
        """See `FixedPass`."""
        return spread(hidden, self.rows, self.starts, self._counts)

    def done(self) -> list[Done]:
        """What to commit to each cache, in order, once all layers have attended."""
        found: list[Done] = []
        for part, (_, attention) in zip(self._slots, self._parts, strict=False):
            assert isinstance(attention, FixedAttention)
            found += part.done(attention.buffers())
        return [*found, *self._passes]


def _alone(part: SlotsPart) -> FixedAttention:
    """Attention of one part, with its arrays as they are."""
    plan = FixedPass([part])
    return FixedAttention(plan.key, part.windows, plan.numbers, part.buffers())


def begin(caches: Sequence[StageCache], counts: Sequence[int]) -> FixedPass | PackedPass:
    """A pass of `counts` positions for the caches, which must be in the order of `in_order`."""
    shelves: dict[Shelf, list[StageCache]] = {}
    own: list[tuple[StageCache, int]] = []
    for cache, count in zip(caches, counts, strict=True):
        if place := place_of(cache):
            shelves.setdefault(place.shelf, []).append(cache)
        else:
            own.append((cache, count))
    together = [SlotsPart(members) for members in shelves.values()]
    rows = sum(len(part.positions) for part in together) + sum(count for _, count in own)
    few = rows <= FEW and len(together) + len(own) <= PARTS
    if few and all(OnePart.fits(cache, count) for cache, count in own):
        parts: list[Part] = [*together]
        return FixedPass([*parts, *(OnePart(cache, count) for cache, count in own)])
    return PackedPass(together, [cache.begin(count) for cache, count in own])


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
    if len(caches) == 1 and not caches[0].content.place:
        return [0]
    arrange(caches, counts)
    return in_order(caches)
