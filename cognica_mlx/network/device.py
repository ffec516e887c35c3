"""MLX settings for a device, to make before the first matrix product, and its weight layout."""

from __future__ import annotations

import os

import mlx.core as mx

from cognica_mlx.backend import blas
from cognica_mlx.network.model import PoEModel


def prepare(dtype: mx.Dtype) -> None:
    """Set MLX's environment variables, unless the user has set them.

    - on an M5 (macOS 26.2) and on CUDA, MLX rounds float32 products to TF32, so drafts and their
      verification would differ: turned off for a float32 model
    - cuDNN's attention mistakes views of some cache buffers for the whole buffer and reads wrong
      rows: turned off

    Raises RequestError if the user chose a BLAS that cannot be used (see `blas`).
    """
    blas.check()
    if mx.default_device() == mx.cpu:
        return
    if dtype == mx.float32:
        os.environ.setdefault("MLX_ENABLE_TF32", "0")
    if mx.cuda.is_available():
        os.environ.setdefault("MLX_CUDA_USE_CUDNN_SDPA", "0")


def lay_out(model: PoEModel) -> None:
    """On a GPU, join a model's matrices, which saves kernels."""
    if mx.default_device() == mx.gpu:
        model.stack()
