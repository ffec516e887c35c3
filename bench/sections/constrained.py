"""What constrained output costs and gains: the time for masks, and forced tokens in one pass.

- in: a setup
- out: the mask's share of a token's time; tokens per second with forced tokens in one pass,
  against one token at a time under the same grammar
- with a made-up vocabulary of the model's size, so that random weights in a real shape will do
"""

from __future__ import annotations

import itertools
import string
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
from llguidance import LLTokenizer
from llguidance.tiktoken import lltokenizer_from_encoding
from tiktoken import Encoding

from cognica_mlx.bench.sections.stage_speeds import Figure, Setup, figure
from cognica_mlx.decoding.choosing import masked
from cognica_mlx.decoding.constraint import Constraint, Grammar
from cognica_mlx.decoding.json_schema import json_grammar
from cognica_mlx.decoding.modes import make_mode
from cognica_mlx.decoding.requests import DecodedToken
from cognica_mlx.decoding.single import decode

# Mostly keys, like forms in practice.
SCHEMA = {
    "type": "object",
    "properties": {
        "customer_identifier": {"type": "integer", "minimum": 0, "maximum": 99999},
        "shipping_address": {
            "type": "object",
            "properties": {
                "street_and_number": {"type": "string", "maxLength": 12},
                "postal_code": {"type": "string", "pattern": "^[0-9]{5}$"},
                "country": {"enum": ["Kenya", "Peru", "Japan"]},
            },
            "required": ["street_and_number", "postal_code", "country"],
            "additionalProperties": False,
        },
        "payment_received": {"type": "boolean"},
    },
    "required": ["customer_identifier", "shipping_address", "payment_received"],
    "additionalProperties": False,
}
# Tokens enough for such a form.
FORM_TOKENS = 160
# How many times a mask is applied to time it.
ROUNDS = 50
# Free text in a string, which has the masks that allow the most.
OPEN = {"type": "string", "minLength": 200}


def constrained(setup: Setup) -> list[Figure]:
    """The share of a token's time at full depth spent on masks, in a string and in a form; and a
    form's speed."""
    vocabulary = made_up(setup.model.config.vocab_size)
    found = []
    for name, schema in (("a string", OPEN), ("a form", SCHEMA)):
        share = partial(_share, setup, Grammar(vocabulary, json_grammar(schema)))
        samples = setup.interleaved({name: share}, f"masks: {name}")
        found.append(figure("constrained", f"masks in {name}", "% of a token", samples[name]))
    return [*found, *_stretches(setup, vocabulary)]


def made_up(size: int) -> LLTokenizer:
    """A byte-level vocabulary of `size` tokens: bytes, then short words, some after a space."""
    ranks = {bytes([i]): i for i in range(256)}
    letters = string.ascii_lowercase
    words = (
        (start + "".join(rest)).encode()
        for length in (1, 2, 3)
        for start in (" ", *string.ascii_letters)
        for rest in itertools.product(letters, repeat=length)
    )
    for word in itertools.islice(words, size - 1 - len(ranks)):
        ranks[word] = len(ranks)
    encoding = Encoding(
        "made up",
        pat_str=r" ?[A-Za-z]+|[^A-Za-z]",
        mergeable_ranks=ranks,
        special_tokens={"<|end|>": len(ranks)},
    )
    return lltokenizer_from_encoding(encoding, n_vocab=size, eos_token=len(ranks))


def _tokens(setup: Setup, constraint: Constraint, count: int) -> Iterator[DecodedToken]:
    model, text = setup.model, setup.texts[0]
    return decode(model, text, make_mode(model), max_tokens=count, constraint=constraint)


def _timed(constraint: Constraint) -> dict[str, list[float]]:
    """The seconds of each call of the constraint's methods, from now on, by method."""
    seconds: dict[str, list[float]] = {}

    def call(name: str, method: Callable[..., Any], *arguments: Any) -> Any:
        started = time.perf_counter()
        done = method(*arguments)
        seconds[name].append(time.perf_counter() - started)
        return done

    for name in ("mask", "forced", "commit", "rollback"):
        seconds[name] = []
        setattr(constraint, name, partial(call, name, getattr(constraint, name)))
    return seconds


def _one_by_one(constraint: Constraint) -> Constraint:
    """The constraint, but only an end token counts as forced: the model predicts every other."""
    forced, ends = constraint.forced, constraint.ends

    def ending() -> list[int]:
        tokens = forced()
        return tokens if ends.issuperset(tokens) else []

    setattr(constraint, "forced", ending)  # noqa: B010
    return constraint


def _share(setup: Setup, grammar: Grammar) -> float:
    constraint = grammar.start()
    tokens = _tokens(setup, constraint, setup.tokens)
    next(tokens)
    seconds, started = _timed(constraint), time.perf_counter()
    for _ in tokens:
        pass
    whole = time.perf_counter() - started
    # On the device, masks are timed separately: they cannot be told apart in a token's graph.
    scores, words = mx.zeros((1, setup.model.config.vocab_size)), grammar.start().mask()[None]
    mx.eval(scores, words)
    started = time.perf_counter()
    for _ in range(ROUNDS):
        mx.eval(masked(scores, words))
    device = len(seconds["mask"]) * (time.perf_counter() - started) / ROUNDS
    return 100 * (sum(map(sum, seconds.values())) + device) / whole


def _stretches(setup: Setup, vocabulary: LLTokenizer) -> list[Figure]:
    """The same form with forced tokens in one pass, and token by token."""
    grammar = Grammar(vocabulary, json_grammar(SCHEMA))
    starts: dict[str, Callable[[], Constraint]] = {
        "a form, token by token": lambda: _one_by_one(grammar.start()),
        "a form, certain stretches in one pass": grammar.start,
    }

    def rate(start: Callable[[], Constraint]) -> float:
        tokens, started = _tokens(setup, start(), FORM_TOKENS), time.perf_counter()
        return sum(1 for _ in tokens) / (time.perf_counter() - started)

    cases = {name: partial(rate, start) for name, start in starts.items()}
    taken = setup.interleaved(cases, "forced tokens")
    base = next(iter(taken.values()))
    return [
        figure("constrained", name, "tokens/s", samples, baseline=base)
        for name, samples in taken.items()
    ]
