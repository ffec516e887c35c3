"""Caches side by side: several sequences' keys and values in one array, attended in one operation.

Sequences that run a position each through a stage, pass after pass, would need a dozen small
operations each and layer: that, not arithmetic, is what a batch of a small model spends its time
on. A *shelf* holds their rows in slots of equal size. A pass writes one row into each slot and
attends over all slots at once, behind a mask where they are filled to different rows.

- rows lie in order, and when caches are put on a shelf all their latest rows lie side by side: so
  as long as they step together, what they see is one stretch of a window's length
- where a slot is full, all caches move to a new shelf with what they still need in front
- `arrange`, before a pass, decides which caches stand on a shelf: those that have run single
  positions for some time, beside others that need about as many rows, so that a shelf holds little
  more than their buffers would
- whatever a slot cannot do (several positions at once, growing, a fork) its cache does by itself,
  once it has left with a copy of its rows
- a cache moves by one assignment, after the rows are in place: an interruption loses nothing
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from cognica_mlx.cache import GROWTH, LARGE, Content, Layer, Span, StageCache

# The most slots of a shelf.
SLOTS = 16
# A cache joins after so many passes of one position. Each time it has to leave doubles that.
STEADY, PATIENCE = 1, 64
# Slots are longer than what stands in them by less than this. A shelf may hold this much more than
# the caches would by themselves, and more for so many passes; it is looked at twice in these.
STEP, WASTE, IDLE = 64, 1.1, 8


@dataclass(frozen=True, eq=False)
class Place:
    """Where a cache's rows stand: in layers of a window, that of position p is p + shifts[window].
    Position `full` and those after it have no room."""

    shelf: Shelf
    slot: int
    shifts: dict[int, int]
    full: int

    def views(self) -> tuple[Layer, ...]:
        """The slot's part of each layer's arrays."""
        one = slice(self.slot, self.slot + 1)
        return tuple(Layer(keys[one], values[one]) for keys, values in self.shelf.layers)

    def rows(self, content: Content) -> list[tuple[mx.array, mx.array]]:
        """Each layer's keys and values (1, KV, rows, head_dim), from the oldest on: views."""
        found = []
        one = slice(self.slot, self.slot + 1)
        for window, (keys, values) in zip(self.shelf.windows, self.shelf.layers, strict=True):
            end = content.offset + self.shifts[window]
            held = slice(end - content.spans[window].held, end)
            found.append((keys[one, :, held], values[one, :, held]))
        return found


class Shelf:
    """Slots of `size` rows, fewer in layers whose windows need no more: arrays
    (slots, KV, rows, head_dim), a pair for each layer."""

    def __init__(self, like: StageCache, size: int, layers: Sequence[tuple[mx.array, mx.array]]):
        self.windows, self.slack, self.size = like.windows, like.slack, size
        self.layers = tuple(layers)
        self.lengths = _lengths(like, size)
        self._caches: list[weakref.ref[StageCache] | None] = [None] * layers[0][0].shape[0]
        self._passes, self._over = 0, False

    @staticmethod
    def gather(caches: Sequence[StageCache]) -> None:
        """Put caches, wherever their rows are, side by side on a new shelf."""
        size = _size(caches)
        lengths = _lengths(caches[0], size)
        ends = {window: max(cache.kept(window) for cache in caches) for window in lengths}
        layers = []
        for i, window in enumerate(caches[0].windows):
            rows = [*_side_by_side(caches, i)]
            pair = [
                mx.concatenate([_shown(a, ends[window], lengths[window]) for a in part])
                for part in zip(*rows, strict=True)
            ]
            if pair[0].nbytes >= LARGE:
                # One layer after the other: little is held twice.
                mx.eval(pair)
            layers.append((pair[0], pair[1]))
        shelf = Shelf(caches[0], size, layers)
        for slot, cache in enumerate(caches):
            shelf._place(cache, slot, ends)

    def admit(self, cache: StageCache) -> None:
        """Put a cache into a free slot."""
        slots = self._slots()
        slot = slots.index(None)
        # Beside the others' latest rows, if it has no more than they.
        ends = {window: cache.kept(window) for window in self.lengths}
        for other in slots:
            if other and (place := other.content.place):
                for window, length in self.lengths.items():
                    end = min(other.offset + place.shifts[window], length - 1)
                    ends[window] = max(ends[window], end)
        layers = []
        rows = cache.rows()
        for window, old, new in zip(self.windows, self.layers, rows, strict=True):
            # The whole slot: nothing of who stood there before may stay.
            shown = [_shown(a, ends[window], self.lengths[window]) for a in new]
            keys, values = (_written(a, slot, part) for a, part in zip(old, shown, strict=True))
            layers.append((keys, values))
        self.layers = tuple(layers)
        self._place(cache, slot, ends)

    def _place(self, cache: StageCache, slot: int, ends: dict[int, int]) -> None:
        """A cache stands here now: its latest row in a window's layers before `ends[window]`."""
        self._caches[slot] = weakref.ref(cache)
        shifts = {window: end - cache.offset for window, end in ends.items()}
        full = min(length - shifts[window] for window, length in self.lengths.items())
        place = Place(self, slot, shifts, full)
        spans = {window: Span(cache.kept(window)) for window in ends}
        cache.content = cache.content._replace(layers=(), place=place, spans=spans)

    def _slots(self) -> list[StageCache | None]:
        """Who stands in each slot."""
        found = [ref() if ref else None for ref in self._caches]
        places = [cache.content.place if cache else None for cache in found]
        return [
            cache if place and place.shelf is self and place.slot == slot else None
            for slot, (cache, place) in enumerate(zip(found, places, strict=True))
        ]

    def caches(self) -> list[StageCache]:
        """Those that stand here."""
        return [cache for cache in self._slots() if cache]

    def takes(self, cache: StageCache) -> bool:
        """Whether there is a slot for a cache as it is."""
        return cache.slack == self.slack and _need(cache) <= self.size and None in self._slots()

    def count_pass(self) -> bool:
        """Note a pass; whether more than `WASTE` has been held for a while.

        To ask every cache is a good part of a small model's pass: it is done from time to time.
        """
        self._passes += 1
        if self._passes % (IDLE // 2):
            return False
        before, held = self._over, len(self._caches) * self.size
        self._over = held > WASTE * sum(map(_alone, self.caches()))
        return before and self._over


def arrange(caches: Sequence[StageCache], counts: Sequence[int]) -> None:
    """Before a pass of so many positions each: caches leave their shelf, or join one.

    All must be of the same stage.
    """
    if len(caches) == 1 and not caches[0].content.place:
        return
    joining: list[StageCache] = []
    # Whose caches step together, and those for which one of them has become too long.
    steps: dict[Shelf, int] = {}
    outgrown: set[Shelf] = set()
    for cache, count in zip(caches, counts, strict=True):
        content = cache.content
        place = content.place
        again = content.written == cache.round
        if count == 1 and not (again and (place is None or _is_large(place.shelf))):
            cache.steady += 1
            if place:
                shelf = place.shelf
                steps[shelf] = steps.get(shelf, 0) + 1
                if content.offset >= place.full:
                    outgrown.add(shelf)
            elif cache.steady > max(cache.patience, STEADY):
                joining.append(cache)
            continue
        cache.steady = 0
        if place:
            cache.patience = min(2 * max(cache.patience, STEADY), PATIENCE)
            cache.leave()
    changing = [
        shelf
        for shelf, count in steps.items()
        if shelf.count_pass() or shelf in outgrown or (count == 1 and len(shelf.caches()) == 1)
    ]
    if changing:
        # With those that are not full: what once had to be apart may go together by now.
        changing += [s for s in steps if s not in changing and len(s.caches()) < SLOTS]
        joining += [cache for shelf in changing for cache in shelf.caches()]
    if joining:
        _join(joining, [shelf for shelf in steps if shelf not in changing])


def _join(caches: Sequence[StageCache], shelves: Sequence[Shelf]) -> None:
    """Give caches a place, those aside for which there is no company."""
    left: list[StageCache] = []
    for cache in caches:
        shelf = next((shelf for shelf in shelves if shelf.takes(cache)), None)
        if shelf:
            shelf.admit(cache)
        else:
            left.append(cache)
    for shelf in shelves:
        there = group = shelf.caches()
        for cache in left:
            if cache.slack == shelf.slack and _go_together([*group, cache]):
                group = [*group, cache]
        if len(group) > len(there):
            Shelf.gather(group)
            left = [cache for cache in left if cache not in group]
    for slack in {cache.slack for cache in left}:
        _regroup([cache for cache in left if cache.slack == slack])


def _regroup(caches: Sequence[StageCache]) -> None:
    """Put caches on new shelves, those that need about as many rows together."""
    left = sorted(caches, key=_need, reverse=True)
    while left:
        count = 1
        while count < len(left) and _go_together(left[: count + 1]):
            count += 1
        if count > 1:
            Shelf.gather(left[:count])
        else:
            left[0].leave()
        del left[:count]


def _go_together(caches: Sequence[StageCache]) -> bool:
    """Whether one shelf of these holds little more than each by itself."""
    held = len(caches) * _size(caches)
    return len(caches) <= SLOTS and held <= WASTE * sum(map(_alone, caches))


def _need(cache: StageCache) -> int:
    """The rows that a slot must have for one more position."""
    return max(
        min(span.held + 1, cache.limit(window)) for window, span in cache.content.spans.items()
    )


def _alone(cache: StageCache) -> int:
    """The rows of its longest buffers when it stands by itself."""
    return _rounded(cache, GROWTH)


def _size(caches: Sequence[StageCache]) -> int:
    """The rows of slots for these."""
    return max(_rounded(cache, STEP) for cache in caches)


def _rounded(cache: StageCache, step: int) -> int:
    return min(cache.limit(max(cache.windows)), -(-_need(cache) // step) * step)


def _is_large(shelf: Shelf) -> bool:
    return any(keys.nbytes >= LARGE for keys, _ in shelf.layers)


def _lengths(cache: StageCache, size: int) -> dict[int, int]:
    """The rows of a slot of `size`, by the layer's window."""
    return {window: min(size, cache.limit(window)) for window in cache.windows}


def _side_by_side(caches: Sequence[StageCache], i: int) -> Iterator[tuple[mx.array, mx.array]]:
    """The rows of the caches' i-th layers (n, KV, rows, head_dim), in which the last row is each
    cache's latest: one part for those that are so on a shelf already. Rows before a cache's own
    count for nothing."""
    window = caches[0].windows[i]
    start = 0
    while start < len(caches):
        place = caches[start].content.place
        stop = start + 1
        if not place:
            yield caches[start].rows()[i]
        else:
            end = caches[start].offset + place.shifts[window]
            while stop < len(caches) and _is_next(caches[stop], place, stop - start, window, end):
                stop += 1
            members = slice(place.slot, place.slot + stop - start)
            keys, values = place.shelf.layers[i]
            yield keys[members, :, :end], values[members, :, :end]
        start = stop


def _is_next(cache: StageCache, first: Place, steps: int, window: int, end: int) -> bool:
    """Whether a cache stands so many slots after the first, and ends at the same row."""
    place = cache.content.place
    return (
        place is not None
        and place.shelf is first.shelf
        and place.slot == first.slot + steps
        and cache.offset + place.shifts[window] == end
    )


def _shown(rows: mx.array, end: int, length: int) -> mx.array:
    """Slots of so many rows, of which the last of `rows` is the one before `end`. What is in the
    rest of a slot counts for nothing, but must be numbers."""
    rows = rows[:, :, -end:]
    return mx.pad(rows, [(0, 0), (0, 0), (end - rows.shape[2], length - end), (0, 0)])


def _written(array: mx.array, slot: int, rows: mx.array) -> mx.array:
    """The array with a slot replaced."""
    # An array object of its own: item assignment changes the one that it is given.
    written = array[:]
    written[slot : slot + 1] = rows
    return written
