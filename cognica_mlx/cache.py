"""The keys and values of one layer: a bounded sliding window that can be rolled back, its mask.

Rows lie in order in a buffer that is longer than the window. New rows go behind the last; when
the buffer is full, the part still needed moves to the front. So one new token needs no mask and
no copy, and a rollback is a subtraction, also long after old rows have been dropped.
"""

from __future__ import annotations

import copy
from typing import Protocol

import mlx.core as mx

from cognica_mlx.errors import RollbackError

GROWTH = 256


class LayerCache(Protocol):
    """What a layer needs of its cache, be it ours or another library's."""

    @property
    def offset(self) -> int | mx.array:
        """The position of the next key; where rows of a batch differ, one for each, (B,)."""

    def mask(self, length: int) -> mx.array | str | None:
        """The mask for the next `length` queries over what `update` will return."""

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append (B, H, T, head_dim); return what T queries at these positions may see."""


class SlidingCache:
    """Keys and values (B, H, rows, head_dim) of the latest positions of one layer.

    `offset` is the position of the next key (rotary needs it), `rows` how many are held
    (attention needs it); they part ways once old rows are dropped. The last `window + slack` rows
    are always kept, so any rollback of up to `slack` positions from the furthest one succeeds.
    The buffer never exceeds `window + 2 * slack` rows.
    """

    def __init__(self, window: int, slack: int):
        self.window, self.slack = window, slack
        self.offset = 0
        self.rows = 0
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    @property
    def limit(self) -> int:
        """The most rows that are ever held."""
        return self.window + 2 * self.slack

    def mask(self, length: int) -> mx.array | str | None:
        """The mask for the next `length` queries over what `update` will return."""
        return window_mask(self.window, self.offset, length)

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append (B, H, T, head_dim); return what T queries at these positions may see.

        That is the `min(offset, window)` rows before them and their own: mask first, evict after.
        """
        length = keys.shape[2]
        visible = min(self.offset, self.window) + length
        limit, kept = self.limit, min(self.rows, self.window + self.slack)
        if self._keys is None or self._values is None:
            self._keys, self._values = keys[..., :0, :], values[..., :0, :]
        if self.rows + length > limit and kept + length > limit:
            # More rows than the buffer ever holds: attend over all, keep the tail of them.
            self._keys = mx.concatenate([self._held(self._keys, kept), keys], axis=2)
            self._values = mx.concatenate([self._held(self._values, kept), values], axis=2)
            seen = [self._keys[..., -visible:, :], self._values[..., -visible:, :]]
            self.rows = min(kept + length, self.window + self.slack)
            self._keys = mx.contiguous(self._keys[..., -self.rows :, :])
            self._values = mx.contiguous(self._values[..., -self.rows :, :])
            self.offset += length
            # The tail is copied before the layer goes on, or all layers' rows would wait for that.
            keys, values = mx.depends(seen, [self._keys, self._values])
            return keys, values
        if self.rows + length > limit:
            self._keys = self._padded(self._held(self._keys, kept), limit)
            self._values = self._padded(self._held(self._values, kept), limit)
            self.rows = kept
        elif self.rows + length > self._keys.shape[2]:
            size = min(limit, -(-(self.rows + length) // GROWTH) * GROWTH)
            self._keys = self._padded(self._held(self._keys, self.rows), size)
            self._values = self._padded(self._held(self._values, self.rows), size)
        end = self.rows + length
        self._keys[..., self.rows : end, :] = keys
        self._values[..., self.rows : end, :] = values
        self.rows = end
        self.offset += length
        return self._keys[..., end - visible : end, :], self._values[..., end - visible : end, :]

    def _held(self, buffer: mx.array, count: int) -> mx.array:
        return buffer[..., self.rows - count : self.rows, :]

    @staticmethod
    def _padded(rows: mx.array, size: int) -> mx.array:
        batch, heads, length, dim = rows.shape
        return mx.concatenate(
            [rows, mx.zeros((batch, heads, size - length, dim), rows.dtype)], axis=2
        )

    @property
    def earliest(self) -> int:
        """The earliest position that `rollback` can return to."""
        dropped = self.offset - self.rows
        return dropped + self.window if dropped else 0

    def rollback(self, position: int) -> None:
        """Forget the keys at `position` and after it. Raises RollbackError beyond `earliest`."""
        if not self.earliest <= position <= self.offset:
            raise RollbackError(
                f"cannot return to position {position}: "
                f"the cache reaches from {self.earliest} to {self.offset}"
            )
        self.rows -= self.offset - position
        self.offset = position

    def fork(self) -> SlidingCache:
        """An independent copy; the buffers are shared until either side writes."""
        other = copy.copy(self)
        # Item assignment rebinds the array object it is given, so a copy needs its own object.
        if self._keys is not None and self._values is not None:
            other._keys, other._values = mx.array(self._keys), mx.array(self._values)
        return other

    def content(self) -> tuple[mx.array, mx.array] | None:
        """The rows held, keys and values (B, H, rows, head_dim); None before the first."""
        if self._keys is None or self._values is None:
            return None
        return self._keys[..., : self.rows, :], self._values[..., : self.rows, :]

    def restore(self, content: tuple[mx.array, mx.array] | None, offset: int) -> None:
        """Hold what another cache of this window and slack gave out as its `content`."""
        self._keys, self._values = content or (None, None)
        self.rows = 0 if content is None else content[0].shape[2]
        self.offset = offset

    def arrays(self) -> list[mx.array]:
        """The buffers, for evaluation and for counting bytes."""
        return [a for a in (self._keys, self._values) if a is not None]


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
