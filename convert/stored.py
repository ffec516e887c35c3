"""A tensor that lies in a file: what it is at once, its values only when asked for; its types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

# By the names that flags and configurations have for them.
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


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
