"""Moved to `mlx_poe.generation.text` in 0.3; this path stays."""

from mlx_poe.generation.text import GenerationResponse as GenerationResponse
from mlx_poe.generation.text import generate as generate
from mlx_poe.generation.text import stream_generate as stream_generate
