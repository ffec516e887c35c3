"""Calibration of a model's stages: the file, the measurements, and replaying modes over them."""

from cognica_mlx.calibration.file import (
    CALIBRATION_FILE,
    PUBLISHED_BOUNDS,
    Calibration,
    CalibrationWarning,
    published_bounds,
    read_calibration,
)

__all__ = [
    "CALIBRATION_FILE",
    "PUBLISHED_BOUNDS",
    "Calibration",
    "CalibrationWarning",
    "published_bounds",
    "read_calibration",
]
