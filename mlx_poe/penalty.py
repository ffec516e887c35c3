"""The repetition penalty to use where the user has not chosen one.

- in: a model, and whether its reply has to have a form: functions are offered, or a schema is set
- out: the penalty, None for no penalty at all
"""

from __future__ import annotations

from cognica_mlx.model import PoEModel

# The model cards recommend it: without a penalty the specialists' greedy replies fall into loops.
SPECIALIST_PENALTY = 1.15


def default_repetition_penalty(model: PoEModel, formal: bool = False) -> float | None:
    """That of `chat_penalty` for a specialist, None for a base model."""
    return chat_penalty(formal) if model.config.specialist_layers else None


def chat_penalty(formal: bool = False) -> float:
    """1.15, or 1.0 where the reply must have a form: a function call repeats the names and values
    it was given, and JSON its quotes and keys, and neither must be penalised."""
    return 1.0 if formal else SPECIALIST_PENALTY
