"""The repetition penalty to use if the user has not set one.

- in: a model, and whether its reply must have a form (functions are offered, or a schema is set)
- out: the penalty, or None for none
"""

from __future__ import annotations

from cognica_mlx.network.model import PoEModel

# The model cards recommend it: without it the specialists' greedy replies fall into loops.
SPECIALIST_PENALTY = 1.15


def default_repetition_penalty(model: PoEModel, formal: bool = False) -> float | None:
    """`chat_penalty` for a specialist, None for a base model."""
    return chat_penalty(formal) if model.config.specialist_layers else None


def chat_penalty(formal: bool = False) -> float:
    """1.15, or 1.0 if the reply must have a form: function calls repeat the names and values they
    were given, and JSON repeats quotes and keys. Neither must be penalized."""
    return 1.0 if formal else SPECIALIST_PENALTY
