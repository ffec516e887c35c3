"""The fields that both endpoints share: how tokens are chosen, in which mode, and when to stop.

- in: a request's `Fields`, and the model that it names
- out: keywords for `Engine.prepare`, and the reply's format
- ranges are OpenAI's; fields that OpenAI lacks are named as in `mlx_poe.generate`
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from cognica_mlx.decoding.modes import MODES, ModeOptions
from cognica_mlx.decoding.sampling import MIN_TEMP
from mlx_poe.generation.text import LIST_OPTIONS, WHOLE_OPTIONS
from mlx_poe.server.catalog import Served
from mlx_poe.server.error_bodies import refused
from mlx_poe.server.fields import Fields, shown

MAX_STOPS = 16
MAX_CHOICES = 16
# OpenAI's fields that have no effect on a server that stores nothing.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")


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
    """`decoding` is for `Engine.prepare`; the rest describes the reply's format.

    `top_logprobs` is None if no log-probabilities were requested.
    """

    served: Served
    max_tokens: int | None
    default_max_tokens: int
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    top_logprobs: int | None = None
    token_stages: bool = False
    no_park: bool = False
    stop: list[str] = field(default_factory=list)
    seed: int | None = None
    decoding: dict[str, Any] = field(default_factory=dict)

    def submission(self, choice: int) -> dict[str, Any]:
        """Keywords for `Engine.prepare`, for one of a prompt's choices."""
        about: dict[str, Any] = {
            "specialist": self.served.specialist,
            "weights": self.served.weights,
            **self.decoding,
        }
        # Each choice has its own seed, independent of what else is running.
        if self.seed is not None:
            about["seed"] = (self.seed + choice) % 2**64
        if self.top_logprobs:
            about["top_logprobs"] = self.top_logprobs
        return {"stop": self.stop, "parks": not self.no_park, **about}


def read_options(body: Fields, served: Served, *, default_max_tokens: int) -> Options:
    """Read the options in `body`. ApiError for a value that cannot be honored."""
    options = Options(served, _max_tokens(body), default_max_tokens)
    options.n = body.whole("n", 1, MAX_CHOICES) or 1
    options.stream = body.flag("stream")
    options.token_stages = body.flag("token_stages")
    options.no_park = body.flag("no_park")
    options.stop = body.texts("stop", MAX_STOPS)
    options.seed = body.whole("seed", -(2**63), 2**64 - 1)
    if streamed := body.object("stream_options"):
        if not options.stream:
            raise refused("stream_options", "it needs stream: true")
        options.include_usage = streamed.flag("include_usage")
        streamed.only("include_obfuscation", False)
        streamed.done()
    body.ignore(IGNORED)
    options.decoding = {**_sampling(body, served.info.vocab_size), **_mode(body)}
    for name in ("regex", "grammar"):
        if name in body:
            options.decoding[name] = body.text(name)
    return options


def _max_tokens(body: Fields) -> int | None:
    names = ("max_tokens", "max_completion_tokens")
    old, new = (body.whole(name, 0, 2**31) for name in names)
    if old is not None and new is not None and old != new:
        raise refused(names[1], f"it is {new}, but {names[0]} is {old}: give only one")
    return old if new is None else new


def _sampling(body: Fields, vocab_size: int) -> dict[str, Any]:
    temperature = body.number("temperature", 0, 2)
    if temperature is not None and 0 < temperature < MIN_TEMP:
        raise refused("temperature", f"{temperature} is neither 0 nor at least {MIN_TEMP}")
    found = {
        "temp": temperature,
        "top_p": body.number("top_p", 0, 1),
        "min_p": body.number("min_p", 0, 1),
        "top_k": body.whole("top_k", 0, 2**31),
        "repetition_penalty": body.number("repetition_penalty", 0.01, 100),
        "repetition_context_size": body.whole("repetition_context_size", 1, 2**31),
        "presence_penalty": body.number("presence_penalty", -2, 2),
        "frequency_penalty": body.number("frequency_penalty", -2, 2),
        "logit_bias": _logit_bias(body, vocab_size),
    }
    return {name: value for name, value in found.items() if value is not None}


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


def _mode(body: Fields) -> dict[str, Any]:
    mode = body.text("mode") or "full"
    if mode not in MODES:
        raise refused("mode", f"{shown(mode)} is not one of {', '.join(MODES)}")
    found: dict[str, Any] = {"mode": mode}
    for option in fields(ModeOptions):
        if option.name in body:
            found[option.name] = _mode_option(body, option.name)
    return found


def _mode_option(body: Fields, name: str) -> Any:
    if name in LIST_OPTIONS:
        kinds = (int,) if name in WHOLE_OPTIONS else (int, float)
        found = body.items(name)
        if not all(isinstance(n, kinds) and not isinstance(n, bool) for n in found or ()):
            raise refused(name, "expected an array of numbers")
        return found
    if name == "draft_head":
        return body.text(name)
    if name == "draft_lookup":
        return body.flag(name)
    if name == "draft_bits":
        bits = body.take(name)
        if isinstance(bits, bool) or not isinstance(bits, (int, str)):
            raise refused(name, f"expected a whole number or a string, got {shown(bits)}")
        return bits
    if name in ("safety", "draft_margin"):
        return body.number(name, 0, 1e9)
    return body.whole(name, 0, 2**31)
