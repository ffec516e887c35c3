"""The repetition penalty that specialists are meant to run with."""

from __future__ import annotations

from cognica_mlx.model import PoEModel

SPECIALIST_PENALTY = 1.15


def default_repetition_penalty(model: PoEModel, offers_functions: bool = False) -> float | None:
    """The recommended penalty for a model's chat turns; None where there should be none."""
    # A function call repeats names and values from the prompt.
    return SPECIALIST_PENALTY if model.config.specialist_layers and not offers_functions else None
