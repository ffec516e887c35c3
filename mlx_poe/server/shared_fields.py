"""The fields that both endpoints share: how tokens are chosen, in which mode, and when to stop.

- in: a request's `Fields`, and the model that it names
- out: keywords for `Engine.prepare`, which checks them, and the response's format
- ranges here are OpenAI's; fields that OpenAI lacks are named as in `mlx_poe.generate`
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from mlx_poe.engine import Engine
from mlx_poe.generation.request import MODE_OPTIONS, GenerationRequest
from mlx_poe.server.catalog import Served
from mlx_poe.server.error_bodies import ApiError, refused
from mlx_poe.server.fields import Fields

MAX_STOPS = 16
MAX_CHOICES = 16
# OpenAI's fields that have no effect on a server that stores nothing.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
RANGES = {
    "temperature": (0, 2),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}
# Read and checked as options of `stream_generate`.
AS_OPTIONS = (
    *("top_p", "top_k", "min_p", "repetition_context_size", "stop", "regex", "grammar"),
    *("mode", "no_fallback", "no_park", *MODE_OPTIONS),
)


@dataclass(frozen=True)
class Limits:
    """Limits on requests. `context` counts the tokens of a prompt and its reply together."""

    body_bytes: int
    context: int
    sequences: int
    queue: int

    @property
    def places(self) -> int:
        """The most sequences that may run or wait."""
        return self.sequences + self.queue


@dataclass
class Options:
    """`decoding` is for `Engine.prepare`, with each of the `prompts`; the rest describes the
    response's format.

    `top_logprobs` is None if no log-probabilities were requested.
    """

    served: Served
    max_tokens: int | None
    default_max_tokens: int
    prompts: list[Any] = field(default_factory=list)
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    top_logprobs: int | None = None
    token_stages: bool = False
    seed: int | None = None
    decoding: dict[str, Any] = field(default_factory=dict)

    def requests(self, engine: Engine, context: int) -> list[GenerationRequest]:
        """A request for each choice, those of a prompt side by side.

        Raises RequestError, or ApiError for a prompt and reply that exceed `context` tokens.
        """
        found = []
        about = {**self.decoding, "top_logprobs": self.top_logprobs}
        about |= {"specialist": self.served.specialist, "weights": self.served.weights}
        for prompt in self.prompts:
            one = engine.prepare(prompt, **about)
            one = replace(one, max_tokens=self._room(len(one.tokens), context))
            for choice in range(self.n):
                # Each choice has its own seed, independent of what else is running.
                seed = None if self.seed is None else (self.seed + choice) % 2**64
                found.append(replace(one, sampling=replace(one.sampling, seed=seed)))
        return found

    def _room(self, prompt_tokens: int, context: int) -> int:
        """How many tokens to generate after a prompt."""
        wanted = self.max_tokens
        if wanted is None:
            wanted = max(min(self.default_max_tokens, context - prompt_tokens), 1)
        if prompt_tokens + wanted > context:
            message = (
                f"{prompt_tokens} prompt tokens and {wanted} to generate exceed the limit of "
                f"{context} together"
            )
            raise ApiError(400, message, "max_tokens", "context_length_exceeded")
        # Even a prompt that is only scored generates one token.
        return max(wanted, 1)


def read_options(body: Fields, served: Served, *, default_max_tokens: int) -> Options:
    """Read the options in `body`. ApiError for a value that cannot be honored."""
    options = Options(served, _max_tokens(body), default_max_tokens)
    options.n = body.whole("n", 1, MAX_CHOICES) or 1
    options.stream = body.flag("stream")
    options.token_stages = body.flag("token_stages")
    options.seed = body.whole("seed", -(2**63), 2**64 - 1)
    if streamed := body.object("stream_options"):
        if not options.stream:
            raise refused("stream_options", "it needs stream: true")
        options.include_usage = streamed.flag("include_usage")
        streamed.only("include_obfuscation", False)
        streamed.done()
    body.ignore(IGNORED)
    numbers = {name: body.number(name, *limits) for name, limits in RANGES.items()}
    options.decoding = {"temp": numbers.pop("temperature"), **numbers}
    options.decoding["logit_bias"] = _logit_bias(body, served.info.vocab_size)
    options.decoding |= {name: body.take(name) for name in AS_OPTIONS if name in body}
    stop = options.decoding.get("stop")
    if isinstance(stop, list) and len(stop) > MAX_STOPS:
        raise refused("stop", f"{len(stop)} strings, {MAX_STOPS} at most")
    return options


def _max_tokens(body: Fields) -> int | None:
    names = ("max_tokens", "max_completion_tokens")
    old, new = (body.whole(name, 0, 2**31) for name in names)
    if old is not None and new is not None and old != new:
        raise refused(names[1], f"it is {new}, but {names[0]} is {old}: give only one")
    return old if new is None else new


def _logit_bias(body: Fields, vocab_size: int) -> dict[int, float] | None:
    given = body.object("logit_bias")
    if given is None:
        return None
    found = {}
    for name in given:
        place = given.name(ascii(name)[1:-1][:20])
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < vocab_size):
            raise refused(place, f"a token id is a whole number below {vocab_size}")
        found[int(name)] = given.number(name, -100, 100)
    return {token: bias for token, bias in found.items() if bias is not None}
