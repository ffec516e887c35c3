"""The keys and values of one stage of one sequence: bounded, and always able to roll back.

Rows lie in order in one buffer per layer, longer than the window. New rows go behind the last;
when the buffer is full, the part still needed moves to the front. So one new token needs no mask,
and a rollback is a subtraction, also long after old rows have been dropped.

MLX copies a whole buffer where it is written while earlier work that reads it is not done. So
between two waits of the driver (`next_round`) a buffer is written once. What comes after that in
the same round, drafts above all, goes to a short tail beside the buffer, attention covers both,
and the next round's first write takes the tail in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import mlx.core as mx

from cognica_mlx.errors import RollbackError

if TYPE_CHECKING:
    from cognica_mlx.shelf import Place

# Buffers grow by so many rows.
GROWTH = 256
# The most rows beside the buffer; and the size in bytes from which a buffer is not worth copying
# (attention in two parts is a few small operations more).
TAIL, LARGE = 64, 1 << 20


class Attention(Protocol):
    """What a layer asks of the cache, ours or another library's, for the positions of one pass."""

    @property
    def offset(self) -> int | mx.array:
        """The first position; an array where it differs: (B,), or (T,) for rows packed into one."""

    def attend(self, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        """Take in keys and values (B, KV, T, head_dim); what queries (B, H, T, head_dim) see."""


class WholeText:
    """Attention without a cache, over a text that begins with these positions."""

    offset = 0

    def __init__(self, window: int, length: int):
        self._mask = window_mask(window, 0, length)

    def attend(self, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        """See `Attention`."""
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=self._mask)


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
    """One layer's arrays (1, KV, rows, head_dim): buffers, of which `Span.rows` are in use, and
    tails."""

    keys: mx.array | None = None
    values: mx.array | None = None
    tail_keys: mx.array | None = None
    tail_values: mx.array | None = None

    def arrays(self) -> list[mx.array]:
        """Its arrays, for evaluation and for counting bytes."""
        found = (self.keys, self.values, self.tail_keys, self.tail_values)
        return [array for array in found if array is not None]


class Content(NamedTuple):
    """All that a `StageCache` holds: replaced as a whole, so that it is never half changed.

    offset: the position of the next key. spans: by window. written: the round of the last write to
    the buffers. place: where the rows are instead of in `layers`, while they stand on a shelf.
    """

    offset: int
    spans: dict[int, Span]
    layers: tuple[Layer, ...]
    written: int = -1
    place: Place | None = None


class Done(Protocol):
    """A pass that has been made."""

    def result(self) -> Content:
        """What its cache holds from then on."""


class StageCache:
    """Keys and values of the latest positions, for the layers of one stage.

    `windows` has one for each layer. `offset` is the position of the next key. The last
    `window + slack` rows are always kept, so any rollback of up to `slack` positions from the
    furthest one succeeds. No buffer exceeds `window + 2 * slack` rows.
    """

    def __init__(self, windows: Sequence[int], slack: int):
        self.windows, self.slack = tuple(windows), slack
        self.content = Content(0, dict.fromkeys(windows, Span()), (Layer(),) * len(windows))
        self.round = 0
        # How many passes of single positions came last; see `shelf.arrange`.
        self.steady, self.patience = 0, 0

    @property
    def offset(self) -> int:
        """The position of the next key."""
        return self.content.offset

    def limit(self, window: int) -> int:
        """The most rows that a buffer ever has."""
        return window + 2 * self.slack

    def is_large(self, window: int) -> bool:
        """Whether the buffers of this window take longer to copy than to work around."""
        keys = self.content.layers[self.windows.index(window)].keys
        return keys is not None and keys.nbytes >= LARGE

    def next_round(self) -> None:
        """All that has been computed from the buffers is done: they may be written again."""
        self.round += 1

    def begin(self, length: int) -> StagePass:
        """A pass of the next `length` positions, off any shelf. Nothing changes before `commit`."""
        return StagePass(self, length)

    def commit(self, done: Done) -> None:
        """Take in what the pass has computed."""
        self.content = done.result()

    @property
    def earliest(self) -> int:
        """The earliest position that `rollback` can return to."""
        return max(
            dropped + window if (dropped := self.offset - span.held) else 0
            for window, span in self.content.spans.items()
        )

    def rollback(self, position: int) -> None:
        """Forget the keys at `position` and after it. Raises RollbackError beyond `earliest`."""
        if not self.earliest <= position <= self.offset:
            raise RollbackError(
                f"cannot return to position {position}: "
                f"the cache reaches from {self.earliest} to {self.offset}"
            )
        gone = self.offset - position
        spans = {
            window: Span(span.rows - max(gone - span.tail, 0), max(span.tail - gone, 0))
            for window, span in self.content.spans.items()
        }
        self.content = self.content._replace(offset=position, spans=spans)

    def fork(self) -> StageCache:
        """An independent copy; the buffers are shared until either side writes."""
        self.leave()
        other = StageCache(self.windows, self.slack)
        other.content, other.round = self.content, self.round
        return other

    def leave(self) -> None:
        """Hold the rows in buffers of its own, if they stand on a shelf. Waits for them."""
        if self.content.place:
            layers = self.layers
            # Until they are copied the shelf would be in use, and be copied where it is written.
            mx.eval([layer.arrays() for layer in layers])
            self.content = self.content._replace(layers=layers, place=None)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Its arrays by layer, copied from the shelf if they stand on one."""
        place = self.content.place
        return place.layers(self.content) if place else self.content.layers

    def rows(self) -> list[tuple[mx.array, mx.array]]:
        """Each layer's keys and values (1, KV, rows, head_dim); empty before the first."""
        found = []
        for window, layer in zip(self.windows, self.layers, strict=True):
            if layer.keys is not None and layer.values is not None:
                span = self.content.spans[window]
                found.append(
                    (
                        _joined(layer.keys, layer.tail_keys, span, span.held),
                        _joined(layer.values, layer.tail_values, span, span.held),
                    )
                )
        return found

    def restore(self, rows: Sequence[tuple[mx.array, mx.array]], offset: int) -> None:
        """Hold what another cache of these windows and this slack gave out as its `rows`."""
        spans = {
            window: Span(keys.shape[2])
            for window, (keys, _) in zip(self.windows, rows, strict=bool(rows))
        }
        layers = tuple(Layer(keys, values) for keys, values in rows)
        empty = StageCache(self.windows, self.slack).content
        self.content = Content(offset, spans, layers) if rows else empty

    def arrays(self) -> list[mx.array]:
        """The buffers and tails, for evaluation and for counting bytes; views of a shelf's."""
        place = self.content.place
        layers = place.views() if place else self.content.layers
        return [array for layer in layers for array in layer.arrays()]


class StagePass:
    """The positions that one sequence runs through a stage: each layer's `Attention`, in turn."""

    def __init__(self, cache: StageCache, length: int):
        self.length = length
        self._cache, self._content = cache, cache.content
        self.offset = cache.content.offset
        self._views: dict[int, _View] = {
            window: _View(span, self.offset, length, window, cache)
            for window, span in cache.content.spans.items()
        }
        self._layers: list[Layer] = []

    def positions(self) -> range:
        """Which they are."""
        return range(self.offset, self.offset + self.length)

    def attend(self, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        """See `Attention`; each call is for the next layer."""
        i = len(self._layers)
        view = self._views[self._cache.windows[i]]
        layer, out = view.attend(self._content.layers[i], q, k, v, scale)
        self._layers.append(layer)
        return out

    def result(self) -> Content:
        """What the cache holds after this pass, whose layers must all have attended."""
        wrote = any(not view.beside for view in self._views.values())
        return Content(
            self.offset + self.length,
            {window: view.after for window, view in self._views.items()},
            tuple(self._layers),
            self._cache.round if wrote else self._content.written,
        )


class _View:
    """How a pass reads and writes the layers of one window."""

    def __init__(self, span: Span, offset: int, length: int, window: int, cache: StageCache):
        self.span, self.length = span, length
        self.limit, self.slack, self.window = cache.limit(window), cache.slack, window
        # What these queries see besides their own rows.
        self.before = min(offset, window)
        self.mask = window_mask(window, offset, length)
        self.beside = (
            cache.content.written == cache.round
            and cache.is_large(window)
            and span.tail + length <= min(TAIL, self.slack)
        )
        if self.beside:
            self.after = Span(span.rows, span.tail + length)
        else:
            # Rows kept where they do not all fit: then the oldest make room.
            self.kept = span.held
            if span.held + length > self.limit:
                self.kept = min(span.held, window + cache.slack)
            self.overflows = self.kept + length > self.limit
            rows = self.kept + length
            self.after = Span(min(rows, window + cache.slack) if self.overflows else rows)

    def attend(
        self, layer: Layer, q: mx.array, k: mx.array, v: mx.array, scale: float
    ) -> tuple[Layer, mx.array]:
        """The layer afterwards, and what the queries see."""
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
            # The tail is copied before the layer goes on, or all layers' rows would wait for that.
            keys, values = mx.depends(views, kept)
            return Layer(*kept), self._see(q, keys, values, scale)
        keys = self._write(layer.keys, layer.tail_keys, k)
        values = self._write(layer.values, layer.tail_values, v)
        end = self.after.rows
        first = end - self.length - self.before
        out = self._see(q, keys[..., first:end, :], values[..., first:end, :], scale)
        return Layer(keys, values), out

    def _see(self, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=self.mask)

    def _held(self, buffer: mx.array, tail: mx.array | None) -> mx.array:
        """The rows kept, in order."""
        return _joined(buffer, tail, self.span, self.kept)

    def _write(self, buffer: mx.array, tail: mx.array | None, new: mx.array) -> mx.array:
        """The buffer with the tail and the new rows behind the old ones."""
        end = self.after.rows
        size = buffer.shape[2]
        if self.kept < self.span.held or end > size:
            # Moved to the front, or to a longer buffer.
            size = min(self.limit, max(size, -(-end // GROWTH) * GROWTH))
            rows = mx.concatenate([self._held(buffer, tail), new], axis=2)
            return mx.pad(rows, [(0, 0), (0, 0), (0, size - end), (0, 0)])
        if self.span.tail and tail is not None:
            new = mx.concatenate([tail[..., : self.span.tail, :], new], axis=2)
        # An array object of its own: item assignment changes the one that it is given.
        written = buffer[:]
        written[..., self.span.rows : end, :] = new
        return written

    def _attend_beside(
        self, layer: Layer, q: mx.array, k: mx.array, v: mx.array, scale: float
    ) -> tuple[Layer, mx.array]:
        """Attention over the buffer as it is and the tail with the new rows, in two parts."""
        tail = self.span.tail
        if tail and layer.tail_keys is not None and layer.tail_values is not None:
            k = mx.concatenate([layer.tail_keys[..., :tail, :], k], axis=2)
            v = mx.concatenate([layer.tail_values[..., :tail, :], v], axis=2)
        assert layer.keys is not None and layer.values is not None
        # The oldest rows that any of the queries sees; a short window may end within the tail.
        count = max(self.before - tail, 0)
        first = self.span.rows - count
        old_k = layer.keys[..., first : self.span.rows, :]
        old_v = layer.values[..., first : self.span.rows, :]
        seen = min(self.before, tail) + self.length
        out = _two_parts(
            q, (old_k, old_v), (k[..., -seen:, :], v[..., -seen:, :]), scale, self.mask
        )
        return Layer(layer.keys, layer.values, k, v), out


def _two_parts(
    q: mx.array,
    old: tuple[mx.array, mx.array],
    new: tuple[mx.array, mx.array],
    scale: float,
    mask: mx.array | str | None,
) -> mx.array:
    """Attention of q (1, H, T, head_dim) over two lots of keys and values (1, KV, n, head_dim)."""
    _, heads, length, dim = q.shape
    kv_heads, count = old[0].shape[1], old[0].shape[2]
    # Queries of one key head side by side: (1, KV, H / KV * T, head_dim).
    grouped = (q * scale).reshape(1, kv_heads, -1, dim)
    scores = mx.concatenate(
        [grouped @ old[0].swapaxes(-1, -2), grouped @ new[0].swapaxes(-1, -2)], axis=-1
    )
    if mask is not None:
        total = scores.shape[-1]
        if isinstance(mask, str):
            mask = mx.arange(total)[None] <= mx.arange(total - length, total)[:, None]
        scores = scores.reshape(1, heads, length, total)
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
        scores = scores.reshape(1, kv_heads, -1, total)
    weights = mx.softmax(scores, axis=-1, precise=True)
    out = weights[..., :count] @ old[1] + weights[..., count:] @ new[1]
    return out.reshape(1, heads, length, dim)


def _joined(buffer: mx.array, tail: mx.array | None, span: Span, count: int) -> mx.array:
    """The last `count` rows held, in order."""
    first = span.rows - (count - span.tail)
    rows = buffer[..., first : span.rows, :]
    if not span.tail or tail is None:
        return rows
    return mx.concatenate([rows, tail[..., : span.tail, :]], axis=2)


def window_mask(window: int, offset: int, length: int) -> mx.array | str | None:
    """The mask for queries at positions offset .. offset + length - 1.

    The keys are those of the `min(offset, window)` positions before them, then their own. None
    where all is visible, "causal" where the window hides nothing, else (length, keys) bool.
    """
    if length == 1:
        return None
    if offset + length <= window + 1:
        return "causal"
    queries = mx.arange(offset, offset + length)[:, None]
    keys = mx.arange(offset - min(offset, window), offset + length)[None]
    return (keys <= queries) & (queries - keys <= window)
