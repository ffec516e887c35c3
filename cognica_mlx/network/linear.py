"""Linear layers: fast for a few rows on the CPU, fused with the residual addition."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from cognica_mlx.backend import blas
from cognica_mlx.backend.traces import constant

# How to pass a few rows to OpenBLAS, if MLX's CPU back end uses it: see `Linear`.
ON_OPENBLAS = blas.is_openblas()
COLUMNS, FULL_ROWS, BLOCK = 3, 16, 4096


class Linear(nn.Linear):
    """A linear layer that is faster for a few rows on the CPU back end with OpenBLAS.

    2 or 3 rows: multiplied as columns from the right, one block of the weights at a time.
    4 to 15 rows: padded to 16, which is faster.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """(..., n_in) -> (..., n_out)."""
        count = x.size // x.shape[-1]
        if not _few(count):
            return x @ constant(self.weight.T)
        rows, n_out = x.reshape(count, -1), self.weight.shape[0]
        if count <= COLUMNS:
            parts = range(0, n_out, BLOCK)
            blocks = [constant(self.weight[i : i + BLOCK]) @ rows.T for i in parts]
            out = (blocks[0] if len(blocks) == 1 else mx.concatenate(blocks)).T
        else:
            padded = mx.pad(rows, [(0, FULL_ROWS - count), (0, 0)])
            out = (padded @ constant(self.weight.T))[:count]
        return out.reshape(*x.shape[:-1], n_out)


def _few(count: int) -> bool:
    """Whether so many rows are multiplied in a way of their own."""
    return ON_OPENBLAS and 1 < count < FULL_ROWS and mx.default_device() == mx.cpu


def added(x: mx.array, linear: nn.Module, h: mx.array) -> mx.array:
    """x (N, n_out) + linear(h (N, n_in)), in one operation where that is as fast."""
    if isinstance(linear, nn.Linear) and not _few(len(h)):
        return mx.addmm(x, h, constant(linear.weight.T))
    out: mx.array = x + linear(h)
    return out
