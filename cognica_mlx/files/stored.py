"""A tensor in a file: its shape and type are known at once, its values are read on demand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import mlx.core as mx
import numpy as np

from cognica_mlx.errors import RequestError

# MLX types by their names in flags and configurations.
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def dtype_named(name: str | None) -> mx.Dtype:
    """The type of that name; by default float32 on the CPU, where half precision is slow, and
    bfloat16 on a GPU. Raises RequestError for another name."""
    if name is None:
        return mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    if name not in DTYPES:
        raise RequestError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: mx.Dtype) -> str:
    """A type's name, without MLX's prefix."""
    return str(dtype).removeprefix("mlx.core.")


def raw(array: mx.array) -> memoryview:
    """An array's bytes. numpy has no bfloat16, so they are read as integers."""
    bits = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.dtype.size]
    return np.ascontiguousarray(np.array(array.view(bits), copy=False)).data


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's shape and type, and how to read it.

    `read` returns an array of this shape and type that nothing else refers to, so that dropping it
    frees its memory. It may be called again.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    read: Callable[[], mx.array]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.dtype.size * prod(self.shape)
