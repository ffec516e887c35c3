"""Moved to `cognica_mlx.network.mlx_lm_model`; older folders import this: this path stays."""

from cognica_mlx.network.mlx_lm_model import Model as Model
from cognica_mlx.network.mlx_lm_model import ModelArgs as ModelArgs
