"""Cognica Product-of-Experts language models on MLX: load, generate, many prompts at once."""

import cognica_mlx  # noqa: F401  first: if MLX is missing, it says what to install
from mlx_poe.engine.batch_generate import batch_generate
from mlx_poe.generation.text import GenerationResponse, generate, stream_generate
from mlx_poe.loading.load import load

__all__ = ["GenerationResponse", "batch_generate", "generate", "load", "stream_generate"]
