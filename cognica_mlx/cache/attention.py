"""Attention without a cache, over two arrays of keys, and within a window: with a window of w, a
position sees itself and the w positions before it."""

from __future__ import annotations

import mlx.core as mx


class WholeText:
    """Attention without a cache, for the positions at the start of a text."""

    offset = 0

    def __init__(self, window: int, length: int):
        self._mask = window_mask(window, 0, length)

    def attend(self, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=self._mask)


def in_two_parts(
    q: mx.array,
    old: tuple[mx.array, mx.array],
    new: tuple[mx.array, mx.array],
    scale: float,
    mask: mx.array | str | None,
) -> mx.array:
    """Attention of q (1, H, T, head_dim) over two sets of keys and values (1, KV, n, head_dim)."""
    _, heads, length, dim = q.shape
    kv_heads, count = old[0].shape[1], old[0].shape[2]
    # Queries grouped by key head: (1, KV, H / KV * T, head_dim).
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


def window_mask(window: int, offset: int, length: int) -> mx.array | str | None:
    """The mask for queries at positions offset .. offset + length - 1.

    The keys are those of the `min(offset, window)` positions before them, then their own. Returns
    None if everything is visible, "causal" if the window hides nothing, else (length, keys) bool.
    """
    if length == 1:
        return None
    if offset + length <= window + 1:
        return "causal"
    queries = mx.arange(offset, offset + length)[:, None]
    keys = mx.arange(offset - min(offset, window), offset + length)[None]
    return (keys <= queries) & (queries - keys <= window)
