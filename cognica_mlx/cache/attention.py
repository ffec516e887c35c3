"""Attention of a whole text, over two arrays of keys, and within a window: with a window of w, a
position sees itself and the w positions before it."""

from __future__ import annotations

import mlx.core as mx

from cognica_mlx.backend.kernels import as_mask, attention, compiles, scores


class Visible:
    """What the queries at positions offset .. offset + length - 1 see of the `min(offset, window)`
    positions before them and of their own. At the start of a text, which needs no cache, it serves
    as each layer's `AttentionCache`."""

    def __init__(self, window: int, offset: int, length: int):
        self.offset, self._window, self._length = offset, window, length
        self._mask: mx.array | None = None

    def mask(self, q: mx.array, kv_heads: int) -> mx.array | None:
        """The mask for `attention` of queries q; None if everything is visible."""
        if self._length > 1 and self._mask is None:
            self._mask = as_mask(self._seen()[None, None], q.dtype, q.shape, kv_heads)
        return self._mask

    def _seen(self) -> mx.array:
        offset, window = self.offset, self._window
        queries = mx.arange(offset, offset + self._length)[:, None]
        keys = mx.arange(offset - min(offset, window), offset + self._length)[None]
        seen = keys <= queries
        return seen if offset + self._length <= window + 1 else seen & (queries - keys <= window)

    def attend(self, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        """Attention of q (B, H, T, head_dim) over keys and values (B, KV, keys, head_dim)."""
        if compiles() and self._length > 1 and self.offset + self._length <= self._window + 1:
            # The kernel knows this mask.
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
        return attention(q, k, v, scale, self.mask(q, k.shape[1]))


def in_two_parts(
    q: mx.array,
    old: tuple[mx.array, mx.array],
    new: tuple[mx.array, mx.array],
    scale: float,
    mask: mx.array | None,
) -> mx.array:
    """Attention of q (B, H, T, head_dim) over two sets of keys and values (B, KV, n, head_dim).

    `mask`, from `as_mask`, is for both, one after the other.
    """
    count = old[0].shape[2]
    both = mx.concatenate([scores(q, keys, scale) for keys, _ in (old, new)], axis=-1)
    if mask is not None:
        if mask.dtype == mx.bool_:
            shape = *q.shape[:3], both.shape[-1]
            mask = mx.broadcast_to(mask, shape).reshape(both.shape)
            both = mx.where(mask, both, mx.finfo(both.dtype).min)
        else:
            both = both + mask
    weights = mx.softmax(both, axis=-1, precise=True)
    out = weights[..., :count] @ old[1] + weights[..., count:] @ new[1]
    return out.reshape(q.shape)
