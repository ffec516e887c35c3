"""Moved to `cognica_mlx.decoding.state` in 0.3; this path stays."""

from cognica_mlx.decoding.state import DecodingState as DecodingState
