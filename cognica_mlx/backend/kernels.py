"""The network's small operations: a kernel each on a GPU, and on the CPU as few as there can be.

MLX builds a graph of operations for each token, and every one of them costs the host about a
microsecond. On a GPU chains of element-wise operations are compiled, and attention, norm and rotary
embedding have kernels. The CPU back end has none of these, and its compiled kernels are slower than
separate operations (16 times for `relu_squared` of 128 rows), so there:

- what all layers of a pass share is computed once: `Rotation`, masks
- numbers are arrays of the shape that they are used in, because each broadcast is an operation
- attention's scale is part of the tables that rotate the queries
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps

import mlx.core as mx
import numpy as np

from cognica_mlx.backend.traces import constant

NORM_EPS = 1.1920929e-07
SOFTCAP = 15.0
# What is made for the sake of the host pays up to so many rows: with more, their own time is large.
FEW = 64


def compiles() -> bool:
    """Whether kernels for whole chains are faster on this device."""
    return mx.default_device() == mx.gpu


def _chain(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    compiled = mx.compile(function, shapeless=True)

    @wraps(function)
    def call(*arrays: mx.array) -> mx.array:
        return compiled(*arrays) if compiles() else function(*arrays)

    return call


def _like(number: mx.array | float, x: mx.array) -> mx.array | float:
    """A constant number in x's shape, for which a trace needs no operation; on a GPU the number as
    it is, because a compiled chain serves all shapes."""
    if compiles():
        return number
    array = number if isinstance(number, mx.array) else mx.array(number, x.dtype)
    return constant(mx.broadcast_to(array, x.shape))


@_chain
def mixed(a: mx.array, x: mx.array, b: mx.array, y: mx.array) -> mx.array:
    """a x + b y; a and b are scalars."""
    return _like(a, x) * x + _like(b, y) * y


@_chain
def relu_squared(x: mx.array) -> mx.array:
    """max(x, 0) squared."""
    return mx.square(mx.maximum(x, _like(0, x)))


@_chain
def gated(values: mx.array, gate: mx.array, embedded: mx.array) -> mx.array:
    """values + 3 sigmoid(gate) embedded: values and embedded (B, H, T, head_dim), gate
    (B, H, T, 1)."""
    return values + _like(3, gate) * mx.sigmoid(gate) * embedded


@_chain
def softcap(logits: mx.array) -> mx.array:
    """Logits soft-capped to stay within +-15."""
    cap = _like(SOFTCAP, logits)
    return cap * mx.tanh(logits / cap)


def norm(x: mx.array) -> mx.array:
    """RMSNorm over the last axis, without a learned weight."""
    if compiles():
        return mx.fast.rms_norm(x, None, NORM_EPS)
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    part, eps = _norm_terms(*rows.shape)
    wide = rows.astype(mx.float32)
    # The mean of the squares as a product with a column: one operation.
    root = mx.rsqrt(mx.addmm(eps, mx.square(wide), part))
    out = (wide * root).astype(x.dtype)
    return out if x.ndim == 2 else out.reshape(x.shape)


@lru_cache(maxsize=512)
def _norm_terms(rows: int, width: int) -> tuple[mx.array, mx.array]:
    """1 / width (width, 1), and eps (rows, 1). From NumPy: nothing to evaluate in any thread."""
    part, eps = np.full((width, 1), 1 / width), np.full((rows, 1), NORM_EPS)
    return mx.array(part.astype(np.float32)), mx.array(eps.astype(np.float32))


@lru_cache(maxsize=64)
def _frequencies(head_dim: int, theta: float) -> np.ndarray:
    powers: np.ndarray = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    frequencies: np.ndarray = np.power(np.float32(theta), powers)
    return frequencies


@lru_cache(maxsize=64)
def _periods(head_dim: int, theta: float) -> mx.array:
    """Negative, because rotation is by minus theta: mx.fast.rope divides positions by these."""
    return mx.array(-_frequencies(head_dim, theta))


@lru_cache(maxsize=64)
def _turns(head_dim: int, theta: float) -> tuple[mx.array, mx.array]:
    """The angles by which one position turns (head_dim,), and the matrix (head_dim, head_dim) that
    takes a head's halves (a, b) to (b, -a)."""
    angles, half = 1 / _frequencies(head_dim, theta), head_dim // 2
    swap = np.zeros((head_dim, head_dim), np.float32)
    at = np.arange(half)
    swap[at + half, at], swap[at, at + half] = 1, -1
    return mx.array(np.concatenate([angles, angles])), mx.array(swap)


@lru_cache(maxsize=64)
def _scales(heads: int, queries: int, scale: float) -> mx.array:
    """`scale` for query heads and 1 for key heads, (heads, 1)."""
    return mx.array(np.where(np.arange(heads) < queries, scale, 1)[:, None].astype(np.float32))


@lru_cache(maxsize=64)
def _steps(batch: int, length: int) -> mx.array:
    return mx.array(np.tile(np.arange(length, dtype=np.float32), batch))


class Rotation:
    """Rotary embedding, by minus theta, of the positions of one pass, for all layers.

    `offset` is the first position of all B texts, or (B,) first positions, or for B = 1 (T,) each
    row's own.
    """

    def __init__(self, offset: int | mx.array, batch: int, length: int, theta: float):
        self._offset, self._batch, self._length, self._theta = offset, batch, length, theta
        self._by_row = batch == 1 and isinstance(offset, mx.array) and offset.size == length > 1
        # Cosines and sines, made for the first layer.
        self._tables: tuple[mx.array, mx.array] | None = None

    def heads(
        self, qk: mx.array, head_dim: int, queries: int, scale: float
    ) -> tuple[mx.array, mx.array, float]:
        """Query and key heads (B, H or KV, T, head_dim), rotated and normalized, of rows
        (B * T, (H + KV) * head_dim).

        Also returns the scale that is left for attention: 1 if the queries are scaled already.
        """
        if compiles():
            qk, left = norm(self._rotated(self._apart(qk, head_dim))), scale
        else:
            rows = norm(qk.reshape(-1, head_dim))
            # Larger tables would be worth less than they take.
            inside = len(qk) <= FEW
            if self._tables is None:
                count = qk.shape[1] // head_dim
                self._tables = self._made(qk.dtype, head_dim, count, queries, scale, inside)
            cosine, sine = self._tables
            swapped = rows @ _turns(head_dim, self._theta)[1].astype(rows.dtype)
            if not inside:
                rows, swapped = (x.reshape(len(qk), -1, head_dim) for x in (rows, swapped))
            rows = rows * cosine + swapped * sine
            if self._length > 1:
                rows = rows.reshape(qk.shape)
            qk, left = self._apart(rows, head_dim), 1.0 if inside else scale
        return qk[:, :queries], qk[:, queries:], left

    def _apart(self, x: mx.array, head_dim: int) -> mx.array:
        """(B * T, H * head_dim) -> (B, H, T, head_dim)."""
        return heads_of(x, self._batch, self._length, head_dim)

    def _rotated(self, x: mx.array) -> mx.array:
        if self._by_row:
            x = x.transpose(2, 1, 0, 3)
        dim = x.shape[-1]
        x = mx.fast.rope(
            x,
            dim,
            traditional=False,
            base=None,
            scale=1.0,
            offset=self._offset,
            freqs=_periods(dim, self._theta),
        )
        return x.transpose(2, 1, 0, 3) if self._by_row else x

    def _made(
        self,
        dtype: mx.Dtype,
        head_dim: int,
        heads: int,
        queries: int,
        scale: float,
        inside: bool,
    ) -> tuple[mx.array, mx.array]:
        """Cosines and sines for rows of heads: (rows * heads, head_dim) with the queries' scale, or
        (rows, 1, head_dim) without."""
        offset = self._offset
        if isinstance(offset, mx.array) and (self._by_row or self._length == 1):
            positions = offset
        else:
            positions = _steps(self._batch, self._length)
            if isinstance(offset, mx.array) and offset.size > 1:
                offset = mx.repeat(offset, self._length)
            positions = positions + offset
        angles = positions.reshape(-1, 1, 1) * _turns(head_dim, self._theta)[0]
        cosine, sine = mx.cos(angles), mx.sin(angles)
        if inside:
            scales = _scales(heads, queries, scale)
            cosine = (cosine * scales).reshape(-1, head_dim)
            sine = (sine * scales).reshape(-1, head_dim)
        return cosine.astype(dtype), sine.astype(dtype)


def heads_of(x: mx.array, batch: int, length: int, head_dim: int) -> mx.array:
    """(B * T, H * head_dim) -> (B, H, T, head_dim)."""
    if length == 1:
        return x.reshape(batch, -1, 1, head_dim)
    return x.reshape(batch, length, -1, head_dim).transpose(0, 2, 1, 3)


def as_mask(seen: mx.array, dtype: mx.Dtype, shape: tuple[int, ...], kv_heads: int) -> mx.array:
    """The mask for `attention` of queries of this shape (B, H, T, head_dim), which sees the keys
    that are true in `seen` (B or 1, 1, T, n)."""
    if compiles():
        return seen
    mask = mx.where(seen, mx.array(0, dtype), mx.array(mx.finfo(dtype).min, dtype))
    batch, heads, length, _ = shape
    mask = mx.broadcast_to(mask, (batch, heads, length, seen.shape[-1]))
    return mask.reshape(batch, kv_heads, heads // kv_heads * length, -1)


def attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None
) -> mx.array:
    """Attention of queries (B, H, T, head_dim) over keys and values (B, KV, n, head_dim).

    `mask` is from `as_mask`, or None if everything is visible.
    """
    if compiles():
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    shape = q.shape
    # The queries of one key head together.
    out = mx.softmax(scores(q, k, scale, mask), axis=-1, precise=True) @ v
    return out.reshape(shape) if out.shape != shape else out


def scores(q: mx.array, k: mx.array, scale: float, mask: mx.array | None = None) -> mx.array:
    """The scores (B, KV, H / KV * T, n) of queries grouped by key head."""
    batch, heads, length, dim = q.shape
    kv_heads = k.shape[1]
    if heads > kv_heads:
        q = q.reshape(batch, kv_heads, heads // kv_heads * length, dim)
    if scale != 1:
        q = q * scale
    found = q @ k.swapaxes(-1, -2)
    return found if mask is None else found + mask
