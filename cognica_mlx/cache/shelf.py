"""Caches side by side: several sequences' keys and values in one array, attended in one operation.

Sequences that each run one position per pass would need a dozen small operations per sequence and
layer; a batch of a small model spends its time on those, not on arithmetic. A *shelf* holds the
sequences' rows in slots of equal size. A pass writes one row into each slot and attends over all
slots at once, with a mask if they are filled to different rows.

- rows lie in order, and caches put on a shelf have their latest rows aligned: as long as they step
  together, they all see the same range of rows
- when a slot is full, all caches move to a new shelf, with the rows they still need at its front
- `arrange`, before a pass, decides which caches go on a shelf: those that have run single positions
  for a while, together with others that need about as many rows, so that a shelf takes little more
  memory than their buffers would
- what a slot cannot do (several positions at once, growing, a fork), its cache does in buffers of
  its own, after leaving with a copy of its rows
- a cache moves by one assignment, after its rows are in place: an interruption loses nothing
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from cognica_mlx.cache.stage_cache import GROWTH, LARGE, Content, Layer, Span, StageCache

# How many slots a shelf may have: few numbers, so that few passes differ in shape.
SLOTS = (2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32)
# A cache joins after more than STEADY passes in a row of one position. Each time it has to leave,
# that number doubles, up to PATIENCE.
STEADY, PATIENCE = 1, 64
# Slots are rounded up to STEP rows. Caches share a shelf if their slots hold at most APART times
# the rows that they would by themselves. A shelf is checked every IDLE / 2 passes, and repacked
# after two checks that find it WASTE times as large as a new one would be.
STEP, APART, WASTE, IDLE = 64, 1.34, 1.1, 8


@dataclass(frozen=True, eq=False)
class ShelfPlace:
    """A cache's place on a shelf: in layers of a given window, position p is in row
    p + shifts[window]. There is no room for position `full` and later ones."""

    shelf: Shelf
    slot: int
    shifts: dict[int, int]
    full: int

    def views(self) -> tuple[Layer, ...]:
        one = slice(self.slot, self.slot + 1)
        return tuple(Layer(keys[one], values[one]) for keys, values in self.shelf.layers)

    def rows(self, content: Content) -> list[tuple[mx.array, mx.array]]:
        found = []
        one = slice(self.slot, self.slot + 1)
        for window, (keys, values) in zip(self.shelf.windows, self.shelf.layers, strict=True):
            end = content.offset + self.shifts[window]
            held = slice(end - content.spans[window].held, end)
            found.append((keys[one, :, held], values[one, :, held]))
        return found


def place_of(cache: StageCache) -> ShelfPlace | None:
    """A cache's place, if it is on a shelf."""
    place = cache.content.place
    assert place is None or isinstance(place, ShelfPlace)
    return place


class Shelf:
    """Slots of `size` rows, or fewer in layers with short windows: a pair of arrays
    (slots, KV, rows, head_dim) for each layer."""

    def __init__(self, like: StageCache, size: int, layers: Sequence[tuple[mx.array, mx.array]]):
        self.windows, self.slack, self.size = like.windows, like.slack, size
        self.layers = tuple(layers)
        self.lengths = _lengths(like, size)
        self._caches: list[weakref.ref[StageCache] | None] = [None] * layers[0][0].shape[0]
        self._passes, self._over = 0, False

    @staticmethod
    def gather(caches: Sequence[StageCache]) -> None:
        """Put caches side by side on a new shelf, whether or not they are on one already."""
        size = _size(caches)
        lengths = _lengths(caches[0], size)
        ends = {window: max(cache.kept(window) for cache in caches) for window in lengths}
        layers = []
        for i, window in enumerate(caches[0].windows):
            rows = [*_side_by_side(caches, i)]
            pair = []
            for part in zip(*rows, strict=True):
                shown = [_shown(a, ends[window], lengths[window]) for a in part]
                free = _slots_for(len(caches)) - len(caches)
                pair.append(mx.pad(mx.concatenate(shown), [(0, free), (0, 0), (0, 0), (0, 0)]))
            if pair[0].nbytes >= LARGE:
                # Layer by layer, so that little is held twice.
                mx.eval(pair)
            layers.append((pair[0], pair[1]))
        shelf = Shelf(caches[0], size, layers)
        for slot, cache in enumerate(caches):
            shelf._place(cache, slot, ends)

    def admit(self, cache: StageCache) -> None:
        """Put a cache into a free slot."""
        slots = self._slots()
        slot = slots.index(None)
        # Aligned with the others' latest rows, if it has no more rows than they.
        ends = {window: cache.kept(window) for window in self.lengths}
        for other in slots:
            if other and (place := place_of(other)):
                for window, length in self.lengths.items():
                    end = min(other.offset + place.shifts[window], length - 2)
                    ends[window] = max(ends[window], end)
        layers = []
        rows = cache.rows()
        for window, old, new in zip(self.windows, self.layers, rows, strict=True):
            # Overwrite the whole slot: nothing of its previous cache may remain.
            shown = [_shown(a, ends[window], self.lengths[window]) for a in new]
            keys, values = (_written(a, slot, part) for a, part in zip(old, shown, strict=True))
            layers.append((keys, values))
        self.layers = tuple(layers)
        self._place(cache, slot, ends)

    def _place(self, cache: StageCache, slot: int, ends: dict[int, int]) -> None:
        """Record that a cache is in `slot`, its latest row at `ends[window]` - 1 by window."""
        self._caches[slot] = weakref.ref(cache)
        shifts = {window: end - cache.offset for window, end in ends.items()}
        # The last row stays free, so that a pass in which a cache takes no part may write to it.
        full = min(length - 1 - shifts[window] for window, length in self.lengths.items())
        place = ShelfPlace(self, slot, shifts, full)
        spans = {window: Span(cache.kept(window)) for window in ends}
        cache.content = cache.content._replace(layers=(), place=place, spans=spans)

    def _slots(self) -> list[StageCache | None]:
        """The cache in each slot, or None."""
        found = [ref() if ref else None for ref in self._caches]
        places = [place_of(cache) if cache else None for cache in found]
        return [
            cache if place and place.shelf is self and place.slot == slot else None
            for slot, (cache, place) in enumerate(zip(found, places, strict=True))
        ]

    def __len__(self) -> int:
        """How many slots it has."""
        return len(self._caches)

    def caches(self) -> list[StageCache]:
        """The caches on it, in the order of their slots."""
        return [cache for cache in self._slots() if cache]

    def takes(self, cache: StageCache) -> bool:
        """Whether there is a free slot large enough for a cache."""
        return cache.slack == self.slack and _need(cache) <= self.size and None in self._slots()

    def count_pass(self) -> bool:
        """Count a pass; True if the shelf has been wasting more than `WASTE` allows for a while.

        Asking every cache takes a good part of a small model's pass, so most passes do not.
        """
        self._passes += 1
        if self._passes % (IDLE // 2):
            return False
        before, caches = self._over, self.caches()
        fresh = _slots_for(len(caches)) * _size(caches) if caches else 0
        self._over = len(self) * self.size > WASTE * fresh
        return before and self._over


def _slots_for(count: int) -> int:
    """The slots of a shelf for so many caches."""
    return next(slots for slots in SLOTS if slots >= count)


def arrange(caches: Sequence[StageCache], counts: Sequence[int]) -> None:
    """Before a pass of `counts` positions, let caches leave their shelf or join one.

    All must be of the same stage.
    """
    joining: list[StageCache] = []
    # How many of each shelf's caches take part, and the shelves that one of them has outgrown.
    steps: dict[Shelf, int] = {}
    outgrown: set[Shelf] = set()
    for cache, count in zip(caches, counts, strict=True):
        content, place = cache.content, place_of(cache)
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
        # Include shelves with free slots: caches that had to be apart may fit together by now.
        changing += [s for s in steps if s not in changing and None in s._slots()]
        joining += [cache for shelf in changing for cache in shelf.caches()]
    if joining:
        _join(joining, [shelf for shelf in steps if shelf not in changing])


def _join(caches: Sequence[StageCache], shelves: Sequence[Shelf]) -> None:
    """Give caches a place on a shelf, except those that fit with no others."""
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
    """Put caches on new shelves, grouped by how many rows they need."""
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
    """Whether one shelf for these takes little more memory than their own buffers would."""
    held = len(caches) * _size(caches)
    return len(caches) <= SLOTS[-1] and held <= APART * sum(map(_alone, caches))


def _need(cache: StageCache) -> int:
    """The rows that a slot needs for one more position of this cache, and a free one."""
    return max(
        min(span.held + 2, cache.limit(window)) for window, span in cache.content.spans.items()
    )


def _alone(cache: StageCache) -> int:
    """The rows of a cache's longest buffers when it is not on a shelf."""
    return _quantized(cache, GROWTH)


def _size(caches: Sequence[StageCache]) -> int:
    """The rows of a slot on a shelf for these caches."""
    return max(_quantized(cache, STEP) for cache in caches)


def _quantized(cache: StageCache, step: int) -> int:
    return min(cache.limit(max(cache.windows)), -(-_need(cache) // step) * step)


def _is_large(shelf: Shelf) -> bool:
    return any(keys.nbytes >= LARGE for keys, _ in shelf.layers)


def _lengths(cache: StageCache, size: int) -> dict[int, int]:
    """The rows of a slot of `size`, by window."""
    return {window: min(size, cache.limit(window)) for window in cache.windows}


def _side_by_side(caches: Sequence[StageCache], i: int) -> Iterator[tuple[mx.array, mx.array]]:
    """The rows (n, KV, rows, head_dim) of the caches' i-th layers, ending with each cache's latest.
    Adjacent caches that are aligned on a shelf already come as one part. Rows before a cache's own
    are meaningless."""
    window = caches[0].windows[i]
    start = 0
    while start < len(caches):
        place = place_of(caches[start])
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


def _is_next(cache: StageCache, first: ShelfPlace, steps: int, window: int, end: int) -> bool:
    """Whether a cache is `steps` slots after the first on its shelf, and ends at the same row."""
    place = place_of(cache)
    return (
        place is not None
        and place.shelf is first.shelf
        and place.slot == first.slot + steps
        and cache.offset + place.shifts[window] == end
    )


def _shown(rows: mx.array, end: int, length: int) -> mx.array:
    """Slots of `length` rows with the last of `rows` just before `end`. The other rows are never
    seen, but must be finite, so they are zero."""
    rows = rows[:, :, -end:]
    return mx.pad(rows, [(0, 0), (0, 0), (end - rows.shape[2], length - end), (0, 0)])


def _written(array: mx.array, slot: int, rows: mx.array) -> mx.array:
    """The array with a slot replaced."""
    # A new array object, because item assignment changes the object in place.
    written = array[:]
    written[slot : slot + 1] = rows
    return written
