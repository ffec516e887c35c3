"""The repetition penalty of a chat whose user has not set one.

The model cards recommend it: without it the specialists' greedy replies fall into loops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_poe.generation.reply_form import CONSTRAINTS

SPECIALIST_PENALTY = 1.15


def with_usual_penalty(options: Mapping[str, Any], specialist: bool) -> dict[str, Any]:
    """Options of `stream_generate` for a chat with a specialist, or with a base model.

    A constrained reply is not penalized: function calls repeat the names and values they were
    given, and JSON repeats quotes and keys.
    """
    if not specialist or options.get("repetition_penalty") is not None:
        return dict(options)
    constrained = any(options.get(name) is not None for name in CONSTRAINTS)
    return {**options, "repetition_penalty": 1.0 if constrained else SPECIALIST_PENALTY}
