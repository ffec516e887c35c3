"""What a model's stages are worth: the file that says so, measuring it, replaying modes over it."""

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
