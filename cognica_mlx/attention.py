"""What a layer's queries see: by way of a cache, or of a whole text at once.

- `AttentionCache` is all that a layer asks for: where keys lie and which are visible is not its
  business
- a window of w shows a position itself and the w before it
"""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx


class AttentionCache(Protocol):
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
        """See `AttentionCache`."""
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=self._mask)


def in_two_parts(
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
