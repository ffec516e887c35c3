"""Cognica Product-of-Experts language models on Apple's MLX: load, generate, stream_generate."""

from mlx_poe.generate import GenerationResponse, generate, stream_generate
from mlx_poe.load import load

__all__ = ["GenerationResponse", "generate", "load", "stream_generate"]
