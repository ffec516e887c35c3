"""The keys and values of one stage of one sequence: bounded, and always able to roll back.

Rows lie in order in one buffer per layer, longer than the window. New rows go after the last; when
the buffer is full, the part still needed moves to the front. So one new token needs no mask, and a
rollback is a subtraction, even long after old rows have been dropped.

Writing to a buffer that unfinished work still reads makes MLX copy all of it. So a large buffer is
written only once between two waits of the driver (`next_round`). Rows that come later in the same
round, mostly drafts, go to a short tail beside the buffer; attention covers both, and the first
write of the next round moves the tail into the buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.core as mx

from cognica_mlx.cache.attention import Visible, in_two_parts
from cognica_mlx.cache.keys_and_values import Done
from cognica_mlx.errors import RollbackError

# Buffers grow by this many rows.
GROWTH = 256
# The most rows in a tail. Buffers of at least LARGE bytes get one: copying them costs more than the
# few small operations that attention in two parts adds.
TAIL, LARGE = 64, 1 << 20


def most_rows(window: int, slack: int, positions: int, row_bytes: int) -> int:
    """The most rows that a layer's buffer and tail have after up to `positions` positions."""
    rows = min(window + 2 * slack, -(-positions // GROWTH) * GROWTH)
    return rows + (min(TAIL, slack) if rows * row_bytes >= LARGE else 0)


class Span(NamedTuple):
    """Where the rows of one window's layers lie: `rows` in the buffer, then `tail` beside it."""

    rows: int = 0
    tail: int = 0

    @property
    def held(self) -> int:
        """Rows held in all."""
        return self.rows + self.tail


@dataclass(frozen=True)
class Layer:
    """One layer's arrays (1, KV, rows, head_dim): buffers, with `Span.rows` rows in use, and tails
    (see `Span.tail`)."""

    keys: mx.array | None = None
    values: mx.array | None = None
    tail_keys: mx.array | None = None
    tail_values: mx.array | None = None

    def arrays(self) -> list[mx.array]:
        """Its arrays, for evaluation and for counting bytes."""
        found = (self.keys, self.values, self.tail_keys, self.tail_values)
        return [array for array in found if array is not None]


class Place(Protocol):
    """Where a cache's rows are while they are on a shelf."""

    def views(self) -> tuple[Layer, ...]:
        """Its part of each layer's arrays."""

    def rows(self, content: Content) -> list[tuple[mx.array, mx.array]]:
        """Views of each layer's keys and values (1, KV, rows, head_dim), oldest first."""


class Content(NamedTuple):
    """Everything that a `StageCache` holds; replaced as a whole, so that it is never half changed.

    offset: the position of the next key. spans: by window. written: the round of the last write to
    the buffers. place: where the rows are while they are on a shelf, instead of in `layers`.
    """

    offset: int
    spans: dict[int, Span]
    layers: tuple[Layer, ...]
    written: int = -1
    place: Place | None = None


class StageCache:
    """The `KeysAndValues` of the latest positions, for the layers of one stage.

    `windows` has one entry for each layer. `offset` is the position of the next key. The last
    `window + slack` rows are always kept, so any rollback of up to `slack` positions from the
    furthest position reached succeeds. No buffer exceeds `window + 2 * slack` rows.
    """

    def __init__(self, windows: Sequence[int], slack: int):
        self.windows, self.slack = tuple(windows), slack
        self.content = Content(0, dict.fromkeys(windows, Span()), (Layer(),) * len(windows))
        self.round = 0
        # How many passes in a row had a single position; see `shelf.arrange`.
        self.steady, self.patience = 0, 0

    @property
    def offset(self) -> int:
        return self.content.offset

    def limit(self, window: int) -> int:
        """The most rows that a buffer can have."""
        return window + 2 * self.slack

    def kept(self, window: int) -> int:
        """How many rows to keep when they are moved: those that a rollback may need."""
        return min(self.content.spans[window].held, window + self.slack)

    def _carried(self, window: int) -> int:
        """How many rows a fork has: all, but from a shelf only those that a rollback may need."""
        return self.kept(window) if self.content.place else self.content.spans[window].held

    def size(self, window: int) -> int:
        """The rows of the buffers of this window."""
        keys = self.content.layers[self.windows.index(window)].keys
        return 0 if keys is None else keys.shape[2]

    def is_large(self, window: int) -> bool:
        """Whether the buffers of this window are too large to be worth copying."""
        keys = self.content.layers[self.windows.index(window)].keys
        return keys is not None and keys.nbytes >= LARGE

    def next_round(self) -> None:
        self.round += 1

    def begin(self, length: int) -> StagePass:
        """A pass of the next `length` positions, for a cache not on a shelf. Changes nothing until
        `commit`."""
        return StagePass(self, length)

    def commit(self, done: Done) -> None:
        self.content = done.result()

    @property
    def earliest(self) -> int:
        return max(
            dropped + window if (dropped := self.offset - self._carried(window)) else 0
            for window in self.content.spans
        )

    def rollback(self, position: int) -> None:
        if not self.earliest <= position <= self.offset:
            raise RollbackError(
                f"cannot return to position {position}: "
                f"the cache holds positions {self.earliest} to {self.offset}"
            )
        gone = self.offset - position
        spans = {
            window: Span(span.rows - max(gone - span.tail, 0), max(span.tail - gone, 0))
            for window, span in self.content.spans.items()
        }
        self.content = self.content._replace(offset=position, spans=spans)

    def fork(self) -> StageCache:
        """An independent copy; the buffers are shared until either side writes."""
        other = StageCache(self.windows, self.slack)
        other.content, other.round = self._off_shelf(), self.round
        return other

    def aside(self) -> StageCache:
        """A fork to be dropped before this cache is used again: until the next round both write
        beside large buffers, so neither has to copy one because of the other."""
        self.content = self.content._replace(written=self.round)
        return self.fork()

    def leave(self) -> None:
        """Move the rows from a shelf, if they are on one, to own buffers. Waits for the copies."""
        self.content = self._off_shelf()

    def trim(self) -> None:
        """Move the rows to buffers of just their size, for a cache that pauses. Waits for them."""
        spare = [
            array.shape[2] - self.content.spans[window].held
            for window, layer in zip(self.windows, self.content.layers, strict=False)
            for array in layer.arrays()[:1]
        ]
        if max(spare, default=0) > 1 or self.content.place:
            self.content = self._copied()

    def _off_shelf(self) -> Content:
        """The content, copied to own buffers if it is on a shelf."""
        return self._copied() if self.content.place else self.content

    def _copied(self) -> Content:
        """The content in own buffers that are just large enough."""
        # One more row, for the next position, makes sure that these are copies and not views.
        room = [(0, 0), (0, 0), (0, 1), (0, 0)]
        kept = {window: self._carried(window) for window in self.windows}
        layers = tuple(
            Layer(*(mx.pad(a[..., -kept[window] :, :], room) for a in pair))
            for window, pair in zip(self.windows, self.rows(), strict=True)
        )
        # Wait: a write to the shelf while these copies still read it would copy the whole shelf.
        mx.eval([layer.arrays() for layer in layers])
        spans = {window: Span(rows) for window, rows in kept.items()}
        return self.content._replace(layers=layers, place=None, spans=spans)

    def rows(self) -> list[tuple[mx.array, mx.array]]:
        """Each layer's keys and values (1, KV, rows, head_dim); empty before the first pass."""
        if place := self.content.place:
            return place.rows(self.content)
        found = []
        for window, layer in zip(self.windows, self.content.layers, strict=True):
            if layer.keys is not None and layer.values is not None:
                span = self.content.spans[window]
                found.append(
                    (
                        _joined(layer.keys, layer.tail_keys, span, span.held),
                        _joined(layer.values, layer.tail_values, span, span.held),
                    )
                )
        return found

    def arrays(self) -> list[mx.array]:
        """The buffers and tails, or views of the shelf's slot, to evaluate or count bytes."""
        place = self.content.place
        layers = place.views() if place else self.content.layers
        return [array for layer in layers for array in layer.arrays()]


class StagePass:
    """One sequence's pass through a stage; serves as the `AttentionCache` of each layer in turn."""

    def __init__(self, cache: StageCache, length: int):
        self.count = length
        self._cache, self._content = cache, cache.content
        self.offset = cache.content.offset
        self.positions, self.starts = range(self.offset, self.offset + length), (0,)
        self._views: dict[int, _View] = {
            window: _View(span, self.offset, length, window, cache)
            for window, span in cache.content.spans.items()
        }
        self._layers: list[Layer] = []

    def attend(self, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        """See `AttentionCache`; each call is for the next layer."""
        i = len(self._layers)
        view = self._views[self._cache.windows[i]]
        layer, out = view.attend(self._content.layers[i], q, k, v, scale)
        self._layers.append(layer)
        return out

    def result(self) -> Content:
        """The cache's content after this pass; all layers must have attended."""
        wrote = any(not view.beside for view in self._views.values())
        return Content(
            self.offset + self.count,
            {window: view.after for window, view in self._views.items()},
            tuple(self._layers),
            self._cache.round if wrote else self._content.written,
        )


class _View:
    """How a pass reads and writes the layers of one window."""

    def __init__(self, span: Span, offset: int, length: int, window: int, cache: StageCache):
        self.span, self.length = span, length
        self.limit, self.slack, self.window = cache.limit(window), cache.slack, window
        # How many earlier rows these queries see.
        self.before = min(offset, window)
        self.visible = Visible(window, offset, length)
        self.beside = (
            cache.content.written == cache.round
            and cache.is_large(window)
            and span.tail + length <= min(TAIL, self.slack)
        )
        if self.beside:
            self.after = Span(span.rows, span.tail + length)
        else:
            # Rows to keep: if they do not all fit, the oldest are dropped.
            self.kept = span.held
            if span.held + length > self.limit:
                self.kept = min(span.held, window + cache.slack)
            self.overflows = self.kept + length > self.limit
            rows = self.kept + length
            self.after = Span(min(rows, window + cache.slack) if self.overflows else rows)

    def attend(
        self, layer: Layer, q: mx.array, k: mx.array, v: mx.array, scale: float
    ) -> tuple[Layer, mx.array]:
        """The layer with the new rows, and the queries' attention output."""
        if layer.keys is None or layer.values is None:
            layer = Layer(k[..., :0, :], v[..., :0, :])
        assert layer.keys is not None and layer.values is not None
        if self.beside:
            return self._attend_beside(layer, q, k, v, scale)
        if self.overflows:
            keys = mx.concatenate([self._held(layer.keys, layer.tail_keys), k], axis=2)
            values = mx.concatenate([self._held(layer.values, layer.tail_values), v], axis=2)
            seen = self.before + self.length
            views = [keys[..., -seen:, :], values[..., -seen:, :]]
            kept = [mx.contiguous(part[..., -self.after.rows :, :]) for part in (keys, values)]
            # Copy the rows to keep before attention goes on; otherwise every layer's full arrays
            # would stay in memory until the copies are made.
            keys, values = mx.depends(views, kept)
            return Layer(*kept), self.visible.attend(q, keys, values, scale)
        keys = self._write(layer.keys, layer.tail_keys, k)
        values = self._write(layer.values, layer.tail_values, v)
        end = self.after.rows
        first = end - self.length - self.before
        out = self.visible.attend(q, keys[..., first:end, :], values[..., first:end, :], scale)
        return Layer(keys, values), out

    def _held(self, buffer: mx.array, tail: mx.array | None) -> mx.array:
        """The rows to keep, in order."""
        return _joined(buffer, tail, self.span, self.kept)

    def _write(self, buffer: mx.array, tail: mx.array | None, new: mx.array) -> mx.array:
        """The buffer with the tail and the new rows after the old ones."""
        end = self.after.rows
        size = buffer.shape[2]
        if self.kept < self.span.held or end > size:
            # Moved to the front, or to a longer buffer.
            size = min(self.limit, max(size, -(-end // GROWTH) * GROWTH))
            rows = mx.concatenate([self._held(buffer, tail), new], axis=2)
            return mx.pad(rows, [(0, 0), (0, 0), (0, size - end), (0, 0)])
        if self.span.tail and tail is not None:
            new = mx.concatenate([tail[..., : self.span.tail, :], new], axis=2)
        # A new array object, because item assignment changes the object in place.
        written = buffer[:]
        written[..., self.span.rows : end, :] = new
        return written

    def _attend_beside(
        self, layer: Layer, q: mx.array, k: mx.array, v: mx.array, scale: float
    ) -> tuple[Layer, mx.array]:
        """Attention in two parts: over the unchanged buffer, and over the tail and new rows."""
        tail = self.span.tail
        if tail and layer.tail_keys is not None and layer.tail_values is not None:
            k = mx.concatenate([layer.tail_keys[..., :tail, :], k], axis=2)
            v = mx.concatenate([layer.tail_values[..., :tail, :], v], axis=2)
        assert layer.keys is not None and layer.values is not None
        # Start at the oldest row that any query sees; with a short window that may be in the tail.
        count = max(self.before - tail, 0)
        first = self.span.rows - count
        old_k = layer.keys[..., first : self.span.rows, :]
        old_v = layer.values[..., first : self.span.rows, :]
        seen = min(self.before, tail) + self.length
        new = k[..., -seen:, :], v[..., -seen:, :]
        out = in_two_parts(q, (old_k, old_v), new, scale, self.visible.mask(q, k.shape[1]))
        return Layer(layer.keys, layer.values, k, v), out


def _joined(buffer: mx.array, tail: mx.array | None, span: Span, count: int) -> mx.array:
    """The last `count` rows held, in order."""
    first = span.rows - (count - span.tail)
    rows = buffer[..., first : span.rows, :]
    if not span.tail or tail is None:
        return rows
    return mx.concatenate([rows, tail[..., : span.tail, :]], axis=2)
