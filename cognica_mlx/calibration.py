"""What was measured about a model's stages, and the small file it is kept in beside the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cognica_mlx.config import PoEConfig

CALIBRATION_FILE = "poe_calibration.json"


@dataclass(frozen=True)
class Calibration:
    """p99_bounds: one for each step between stages, as `decoding.wand` takes them."""

    p99_bounds: tuple[float, ...]

    @classmethod
    def load(cls, path: Path, config: PoEConfig) -> Calibration:
        raise NotImplementedError


def published_bounds(config: PoEConfig) -> Sequence[float] | None:
    return None
