"""The constraint that a caller puts on a reply, as a grammar, and the penalty of replies without.

- in: a JSON schema, a regular expression, a Lark grammar, or functions to call
- out: a compiled `Grammar` for this tokenizer; each reply starts its own constraint from it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from llguidance import LLTokenizer

from cognica_mlx.decoding.constraint import Grammar, lark_grammar, regex_grammar
from cognica_mlx.decoding.json_schema import json_grammar
from cognica_mlx.errors import RequestError
from mlx_poe.generation.tools import call_grammar
from mlx_poe.loading.tokenizer import Tokenizer

# Each option of everything that generates, with what makes a grammar of its value.
_SOURCES: dict[str, Callable[[Any], str]] = {
    "json_schema": json_grammar,
    "regex": regex_grammar,
    "grammar": lark_grammar,
}
CONSTRAINTS = (*_SOURCES, "tools")
FORM_OPTIONS = (*CONSTRAINTS, "tool_choice")

# The model cards recommend it: without it the specialists' greedy replies fall into loops.
SPECIALIST_PENALTY = 1.15


def with_usual_penalty(options: Mapping[str, Any], specialist: bool) -> dict[str, Any]:
    """Options of `stream_generate` for a chat with a specialist, or with a base model.

    Unless the user has set it, a specialist's repetition penalty is `SPECIALIST_PENALTY`, but a
    constrained reply is not penalized: function calls repeat the names and values they were given,
    and JSON repeats quotes and keys.
    """
    if not specialist or options.get("repetition_penalty") is not None:
        return dict(options)
    constrained = any(options.get(name) is not None for name in CONSTRAINTS)
    return {**options, "repetition_penalty": 1.0 if constrained else SPECIALIST_PENALTY}


def make_grammar(
    tokenizer: Tokenizer, *, tool_choice: str | None = None, **options: Any
) -> Grammar | None:
    """The grammar for the option of `CONSTRAINTS` that is given; None if there is none.

    Raises RequestError for an option that cannot be used, or if several are given.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if tool_choice is not None and "tools" not in given:
        raise RequestError("tool_choice is given, but no tools")
    if len(given) > 1:
        names = (name for name in CONSTRAINTS if name in given)
        raise RequestError(f"{' and '.join(names)} cannot be combined: give one")
    for name, value in given.items():
        try:
            if name == "tools":
                source = call_grammar(value, tool_choice or "auto")
            else:
                source = _SOURCES[name](value)
            return _compiled(tokenizer.vocabulary, source)
        except RequestError as error:
            raise RequestError(f"{name}: {error}") from None
    return None


# A file of prompts, or a chat, uses the same grammar again and again.
@lru_cache(maxsize=16)
def _compiled(vocabulary: LLTokenizer, source: str) -> Grammar:
    return Grammar(vocabulary, source)
