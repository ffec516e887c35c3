"""The form that a caller wants a reply to have, as a grammar.

- in: a JSON schema, a regular expression, a Lark grammar, or functions to call
- out: a compiled `Grammar` for this tokenizer; each reply starts its own constraint from it
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from llguidance import LLTokenizer

from cognica_mlx.decoding.constraint import Grammar, lark_grammar, regex_grammar
from cognica_mlx.decoding.json_schema import json_grammar
from cognica_mlx.errors import RequestError
from mlx_poe.generation.tools import call_grammar
from mlx_poe.loading.tokenizer import Tokenizer

# Their names as options of everything that generates.
CONSTRAINTS = ("json_schema", "regex", "grammar", "tools")
FORM_OPTIONS = (*CONSTRAINTS, "tool_choice")


def make_grammar(
    tokenizer: Tokenizer,
    *,
    json_schema: Mapping[str, Any] | str | None = None,
    regex: str | None = None,
    grammar: str | None = None,
    tools: Any = None,
    tool_choice: str | None = None,
) -> Grammar | None:
    """The grammar for the option given; None if there is none.

    Raises RequestError for an option that cannot be used, or if several are given.
    """
    options = zip(CONSTRAINTS, (json_schema, regex, grammar, tools), strict=True)
    given = {name: value for name, value in options if value is not None}
    if tool_choice is not None and tools is None:
        raise RequestError("tool_choice is given, but no tools")
    if len(given) > 1:
        raise RequestError(f"{' and '.join(given)} cannot be combined: give one")
    for name, value in given.items():
        try:
            if name == "json_schema":
                source = json_grammar(value)
            elif name == "regex":
                source = regex_grammar(value)
            elif name == "grammar":
                source = lark_grammar(value)
            else:
                source = call_grammar(value, tool_choice or "auto")
            return _compiled(tokenizer.vocabulary, source)
        except RequestError as error:
            raise RequestError(f"{name}: {error}") from None
    return None


# A file of prompts, or a chat, uses the same grammar again and again.
@lru_cache(maxsize=16)
def _compiled(vocabulary: LLTokenizer, source: str) -> Grammar:
    return Grammar(vocabulary, source)
