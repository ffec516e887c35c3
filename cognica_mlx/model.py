"""Moved to `cognica_mlx.network.model` in 0.3; this path stays."""

from cognica_mlx.network.model import PoEModel as PoEModel
