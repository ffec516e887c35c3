"""Moved to `mlx_poe.loading.specialists` in 0.3; this path stays."""

from mlx_poe.loading.specialists import Specialists as Specialists
