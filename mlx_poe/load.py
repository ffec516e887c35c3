"""Moved to `mlx_poe.loading.load` in 0.3; this path stays."""

from mlx_poe.loading.load import load as load
