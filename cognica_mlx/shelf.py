"""Caches side by side: several sequences' keys and values in one array, attended in one operation.

Sequences that run a position each through a stage, pass after pass, would need a dozen small
operations each and layer: that, not arithmetic, is what a batch of a small model spends its time
on. A *shelf* holds their rows in slots of equal size. A pass writes one row into each slot and
attends over all slots at once, behind a mask where they are filled to different rows.

- the key of position p is in row p modulo the slot's length: where all rows are taken, a new one
  replaces the oldest
- `arrange`, before a pass, decides which caches stand on a shelf: those that have run single
  positions for some time, beside others that need about as many rows, so that a shelf holds little
  more than their buffers would
- whatever a slot cannot do (several positions at once, growing, a fork) its cache does by itself,
  once it has left with a copy of its rows
- a cache moves by one assignment, after the rows are in place: an interruption loses nothing
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
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
    """Where a cache's rows stand."""

    shelf: Shelf
    slot: int

    def views(self) -> tuple[Layer, ...]:
        """The slot's part of each layer's arrays."""
        one = slice(self.slot, self.slot + 1)
        return tuple(Layer(keys[one], values[one]) for keys, values in self.shelf.layers)

    def layers(self, content: Content) -> tuple[Layer, ...]:
        """Each layer's rows from the oldest on, in arrays of their own."""
        found = []
        for window, layer in zip(self.shelf.windows, self.views(), strict=True):
            first = content.offset - content.spans[window].held
            rows = (_rolled(a, -(first % a.shape[2])) for a in layer.arrays())
            found.append(Layer(*(mx.contiguous(a) for a in rows)))
        return tuple(found)


class Shelf:
    """Slots of `size` rows, fewer in layers whose windows need no more: arrays
    (slots, KV, rows, head_dim), a pair for each layer."""

    def __init__(self, like: StageCache, size: int, layers: Sequence[tuple[mx.array, mx.array]]):
        self.windows, self.slack, self.size = like.windows, like.slack, size
        self.layers = tuple(layers)
        # The rows of a slot by the layer's window.
        self.lengths = {w: min(size, w + 2 * like.slack) for w in like.windows}
        self._caches: list[weakref.ref[StageCache] | None] = [None] * layers[0][0].shape[0]
        self._passes, self._over = 0, False

    @staticmethod
    def gather(caches: Sequence[StageCache]) -> None:
        """Put caches, wherever their rows are, side by side on a new shelf."""
        layers, size = [], _size(caches)
        for i in range(len(caches[0].windows)):
            rows = [_slot(cache, i, size) for cache in caches]
            keys, values = (mx.concatenate([*part]) for part in zip(*rows, strict=True))
            if keys.nbytes >= LARGE:
                # One layer after the other: little is held twice.
                mx.eval(keys, values)
            layers.append((keys, values))
        shelf = Shelf(caches[0], size, layers)
        for slot, cache in enumerate(caches):
            shelf._place(cache, slot)

    def admit(self, cache: StageCache) -> None:
        """Put a cache into a free slot."""
        slot = self._slots().index(None)
        layers = []
        for i, (keys, values) in enumerate(self.layers):
            # The whole slot: nothing of who stood there before may stay.
            new_keys, new_values = _slot(cache, i, self.size)
            layers.append((_written(keys, slot, new_keys), _written(values, slot, new_values)))
        self.layers = tuple(layers)
        self._place(cache, slot)

    def _place(self, cache: StageCache, slot: int) -> None:
        self._caches[slot] = weakref.ref(cache)
        cache.content = cache.content._replace(
            layers=(), place=Place(self, slot), spans=_without_tails(cache.content)
        )

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
                if content.offset >= shelf.size and _need(cache) > shelf.size:
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


def _without_tails(content: Content) -> dict[int, Span]:
    return {window: Span(span.held) for window, span in content.spans.items()}


def _slot(cache: StageCache, i: int, size: int) -> tuple[mx.array, mx.array]:
    """The rows of a cache's i-th layer as a slot holds them. What is in the rest of the slot counts
    for nothing, but must be numbers."""
    length = min(size, cache.limit(cache.windows[i]))
    keys, values = cache.rows()[i]
    rows = keys.shape[2]
    first = (cache.offset - rows) % length
    room = [(0, 0), (0, 0), (0, length - rows), (0, 0)]
    pair = mx.pad(keys, room), mx.pad(values, room)
    return (_rolled(pair[0], first), _rolled(pair[1], first)) if first else pair


def _rolled(array: mx.array, count: int) -> mx.array:
    """The rows so many places on, the last ones in front."""
    return mx.roll(array, count, axis=2)  # type: ignore[call-arg]


def _written(array: mx.array, slot: int, rows: mx.array) -> mx.array:
    """The array with a slot replaced."""
    # An array object of its own: item assignment changes the one that it is given.
    written = array[:]
    written[slot : slot + 1] = rows
    return written
