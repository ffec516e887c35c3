"""Moved to `cognica_mlx.network.mlx_lm_model` in 0.3; folders converted before import this path."""

from cognica_mlx.network.mlx_lm_model import Model as Model
from cognica_mlx.network.mlx_lm_model import ModelArgs as ModelArgs
