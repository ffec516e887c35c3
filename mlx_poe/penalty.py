"""The repetition penalty to use where the user has not chosen one.

- in: a model, and whether functions are offered to it
- out: the penalty, None for no penalty at all
"""

from __future__ import annotations

from cognica_mlx.model import PoEModel

# The model cards recommend it: without a penalty the specialists' greedy replies fall into loops.
SPECIALIST_PENALTY = 1.15


def default_repetition_penalty(model: PoEModel, offers_functions: bool = False) -> float | None:
    """1.15 for a specialist, 1.0 for one that is offered functions, None for a base model.

    A function call repeats the names and values it was given, so it must not be penalised.
    """
    if not model.config.specialist_layers:
        return None
    return 1.0 if offers_functions else SPECIALIST_PENALTY
