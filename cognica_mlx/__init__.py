"""The engine, on token ids: model, cache, state, sampling and decoding modes."""

from cognica_mlx.backend import blas

blas.open_fast()  # before MLX looks for one

try:
    import mlx.core  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"MLX cannot be loaded ({error}). On Linux it needs a back end: "
        "pip install 'mlx[cpu]', or 'mlx[cuda12]' or 'mlx[cuda13]' for an NVIDIA GPU"
    ) from None
