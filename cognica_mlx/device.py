"""What MLX must be told about a device before the first product, and the layout that suits it."""

from __future__ import annotations

import os

import mlx.core as mx

from cognica_mlx.model import PoEModel


def prepare(dtype: mx.Dtype) -> None:
    """Set what MLX reads from the environment, unless the user has set it.

    - float32 products are rounded to TF32 on an M5 (macOS 26.2) and on CUDA, so drafts and their
      verification would differ: a float32 model asks for float32
    - cuDNN's attention takes a view of some cache buffers for the whole buffer, and sees wrong rows
    """
    if mx.default_device() == mx.cpu:
        return
    if dtype == mx.float32:
        os.environ.setdefault("MLX_ENABLE_TF32", "0")
    if mx.cuda.is_available():
        os.environ.setdefault("MLX_CUDA_USE_CUDNN_SDPA", "0")


def lay_out(model: PoEModel) -> None:
    """Join a model's matrices where that saves kernels: on a GPU."""
    if mx.default_device() == mx.gpu:
        model.stack()
