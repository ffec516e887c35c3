"""Grammar-constrained output: which tokens may come next, and which must.

- in: a grammar (JSON schema, regular expression, Lark), compiled once; tokens as they are chosen
- out: for each position the allowed tokens, and stretches of forced tokens
- masks alone decide: a grammar may accept the same text as different tokens, but the mask of a
  forced stretch allows only one tokenization, so drafting and plain decoding get the same tokens
- llguidance does the parsing; decoding knows only the protocol `Constraint`
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from cognica_mlx.errors import RequestError

# Limits on a grammar's text in bytes and on the tokens forced at its start, so that compiling takes
# a second or two at most. llguidance limits the rest by work done, not by the clock.
MAX_TEXT, MAX_FORCED = 256 * 1024, 4096
# llguidance compiles rules by recursion, and its stack overflows at several thousand.
MAX_RULES = 500
_RULE = re.compile(r"^[ \t]*[?!]?[A-Za-z_]\w*[^:\n\"/]*:", re.MULTILINE)
# Characters of llguidance's errors, which quote the grammar.
MAX_MESSAGE = 300
_SURROGATE = re.compile("[\ud800-\udfff]")
# In llguidance's errors about limits while it works.
_TOO_COMPLEX = ("items; max is", "too many", "limit", "too large")


class Constraint(Protocol):
    """One text's progress through a grammar."""

    @property
    def ended(self) -> bool:
        """Whether a token that ends the text has been committed; nothing may follow."""

    @property
    def length(self) -> int:
        """How many tokens have been committed."""

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end the text where the grammar allows it to end."""

    def mask(self) -> mx.array:
        """Which tokens may come next: (ceil(V / 32),) uint32, the lowest bit for the first.

        Raises RequestError if no token may, or if the grammar has become too complex.
        """

    def forced(self) -> list[int]:
        """The tokens that must come next, as many as are certain; empty if there is a choice."""

    def commit(self, tokens: Sequence[int]) -> None:
        """Append tokens; each must be allowed by the mask at its position."""

    def rollback(self, count: int) -> None:
        """Take back the last `count` tokens."""


class Grammar:
    """A compiled grammar. Raises RequestError if it cannot be compiled, matches no text, or is too
    large."""

    def __init__(self, vocabulary: LLTokenizer, source: str):
        """`source` is the result of `json_grammar`, `regex_grammar` or `lark_grammar`."""
        limits = LLParserLimits(verbose_errors=False)
        self._vocabulary = vocabulary
        self._matcher = LLMatcher(vocabulary, source, log_level=0, limits=limits)
        _raise_for(self._matcher)
        first = self.start()
        first.mask()
        if len(first.forced()) > MAX_FORCED:
            raise RequestError(
                f"the grammar begins with more than {MAX_FORCED} fixed tokens;"
                " a rule that requires itself never ends"
            )

    def start(self) -> GrammarConstraint:
        """A constraint at the beginning of a text."""
        return GrammarConstraint(self._vocabulary, self._matcher.deep_copy())


class GrammarConstraint:
    """A `Constraint` by llguidance."""

    def __init__(self, vocabulary: LLTokenizer, matcher: LLMatcher):
        self._matcher = matcher
        self.ends = frozenset(vocabulary.eos_tokens)
        self._end = vocabulary.eos_token
        self._size = vocabulary.vocab_size
        # The current mask, and the tokens that it allows if they are few.
        self._words: np.ndarray | None = None
        self._few: list[int] = []
        self._tokens: list[int] = []

    @property
    def ended(self) -> bool:
        return bool(self._tokens) and self._tokens[-1] in self.ends

    @property
    def length(self) -> int:
        return len(self._tokens)

    def mask(self) -> mx.array:
        return mx.array(self._mask())

    def _mask(self) -> np.ndarray:
        if self._words is None:
            words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
            # In a dead end llguidance's mask allows the end token, so check for an error first.
            _raise_for(self._matcher)
            bits = np.unpackbits(words.view(np.uint8), count=self._size, bitorder="little")
            # More tokens than this are always a choice.
            few = max(len(self.ends), 1)
            self._few = bits.nonzero()[0].tolist() if np.count_nonzero(bits) <= few else []
            if self._few and self.ends.issuperset(self._few):
                # If the text can only end here, any end token will do.
                self._few = [self._end]
                words = np.zeros_like(words)
                words[self._end // 32] = 1 << self._end % 32
            self._words = words
        return self._words

    def forced(self) -> list[int]:
        if self.ended:
            return []
        if tokens := self._matcher.compute_ff_tokens():
            return tokens
        self._mask()
        return self._few if len(self._few) == 1 else []

    def commit(self, tokens: Sequence[int]) -> None:
        self._words = None
        # A matcher that knows that nothing can follow does not accept an end token.
        self._matcher.consume_tokens([token for token in tokens if token not in self.ends])
        _raise_for(self._matcher)
        self._tokens += tokens

    def rollback(self, count: int) -> None:
        if count:
            self._words = None
            gone = self._tokens[-count:]
            self._matcher.rollback(sum(token not in self.ends for token in gone))
            _raise_for(self._matcher)
            del self._tokens[-count:]


def regex_grammar(expression: str) -> str:
    """The grammar for text that matches a regular expression, in the syntax of Rust's `regex`."""
    return LLMatcher.grammar_from_regex(check_grammar_text(expression))


def lark_grammar(text: str) -> str:
    """A grammar in Lark's notation, with llguidance's additions."""
    if (count := len(_RULE.findall(check_grammar_text(text)))) > MAX_RULES:
        raise RequestError(f"the grammar has {count} rules, {MAX_RULES} is the limit")
    return LLMatcher.grammar_from_lark(text)


def check_grammar_text(text: str) -> str:
    """The text of a grammar or schema. RequestError if it is too long, or has no UTF-8."""
    if not isinstance(text, str):
        raise RequestError(f"a grammar is text, not {type(text).__name__}")
    check_characters(text, "the grammar")
    if (size := len(text.encode())) > MAX_TEXT:
        raise RequestError(f"the grammar has {size} bytes, {MAX_TEXT} is the limit")
    return text


def check_characters(text: str, what: str) -> None:
    """Raise RequestError for half a surrogate pair, which no generated text can match."""
    if found := _SURROGATE.search(text):
        raise RequestError(
            f"{what} contains {found[0]!a}, which is not a character"
            " (half of a surrogate pair, or a byte that is not UTF-8)"
        )


def _raise_for(matcher: LLMatcher) -> None:
    """Raise a one-line RequestError if the matcher has failed."""
    if matcher.is_error():
        if matcher.get_error().startswith("NoExtension"):
            raise RequestError("no text fits the grammar")
        lines = matcher.get_error().split("<non-verbose/>")[0].split("\n")
        message = " ".join(" ".join(line.strip(" |^") for line in lines).split())
        message = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]} ..."
        if any(words in message for words in _TOO_COMPLEX):
            raise RequestError(f"the grammar is too complex, simplify it: llguidance: {message}")
        raise RequestError(f"the grammar cannot be used: {message}")
