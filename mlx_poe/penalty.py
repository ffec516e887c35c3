"""The repetition penalty to use where the user has not chosen one.

- in: a model, and whether its reply has to have a form: functions are offered, or a schema is set
- out: the penalty, None for no penalty at all
"""

from __future__ import annotations

from cognica_mlx.model import PoEModel

# The model cards recommend it: without a penalty the specialists' greedy replies fall into loops.
SPECIALIST_PENALTY = 1.15


def default_repetition_penalty(model: PoEModel, formal: bool = False) -> float | None:
    """1.15 for a specialist, 1.0 where its reply must have a form, None for a base model.

    A function call repeats the names and values it was given, and JSON its quotes and keys: neither
    must be penalised.
    """
    if not model.config.specialist_layers:
        return None
    return 1.0 if formal else SPECIALIST_PENALTY
