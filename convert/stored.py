"""A tensor that lies in a file: what it is at once, its values only when asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class StoredTensor:
    """Shape and type of a tensor, and how to get it.

    `read` gives an array of this shape and type that nothing else holds, so that its memory is
    free again once the caller lets go of it. It may be called again.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    read: Callable[[], mx.array]

    @property
    def nbytes(self) -> int:
        """Bytes that its values take."""
        size = self.dtype.size
        for length in self.shape:
            size *= length
        return size
