"""From scores to tokens: biases, penalties, filters, temperature, and a seeded random source.

- in: `Scores` of consecutive positions, the tokens before each, a constraint's masks
- out: chosen tokens, the best alternatives, or the whole distribution to draw from
- order as in mlx-lm: bias, repetition penalty, presence and frequency penalties, mask, top-p,
  min-p, top-k, temperature
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, log
from typing import NamedTuple

import mlx.core as mx

from cognica_mlx.errors import RequestError
from cognica_mlx.network.model import log_softmax

# Scores divided by less than this overflow; divided by more, they are all equal in float32.
MIN_TEMP, MAX_TEMP = 1e-6, 1e6
MAX_TOP_LOGPROBS = 100


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose a token, and what to report about the choice; temp 0 is greedy.

    `logit_bias` is added to tokens' scores, by id. As in OpenAI's API, `frequency_penalty` is
    subtracted from a token's score for each time it occurs in the reply, `presence_penalty` once if
    it occurs at all. `repetition_penalty` lowers the scores of the last `repetition_context_size`
    tokens, prompt included. The log-probabilities of the `top_logprobs` best tokens are reported.

    Raises RequestError for a value out of range.
    """

    temp: float = 0.0
    top_p: float = 0.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    repetition_context_size: int = 20
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    top_logprobs: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temp != 0 and not MIN_TEMP <= self.temp <= MAX_TEMP:
            raise RequestError(
                f"temp {self.temp} is neither 0 (greedy) nor between {MIN_TEMP} and {MAX_TEMP}"
            )
        for name in ("top_p", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise RequestError(f"{name} {getattr(self, name)} is not between 0 and 1")
        if self.top_k < 0:
            raise RequestError(f"top_k {self.top_k} is negative (0 turns it off)")
        if self.repetition_penalty is not None and not self.repetition_penalty > 0:
            raise RequestError(f"repetition_penalty {self.repetition_penalty} is not above 0")
        if self.repetition_context_size < 1:
            raise RequestError(f"repetition_context_size {self.repetition_context_size} is below 1")
        for name in ("presence_penalty", "frequency_penalty"):
            if not isfinite(getattr(self, name)):
                raise RequestError(f"{name} {getattr(self, name)} is not a finite number")
        for token, bias in (self.logit_bias or {}).items():
            if not isinstance(token, int):
                raise RequestError(f"logit_bias: {token!r:.20} is not a token id")
            if not isfinite(bias):
                raise RequestError(f"logit_bias of token {token}: {bias} is not a finite number")
        if not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise RequestError(
                f"top_logprobs {self.top_logprobs} is not between 0 and {MAX_TOP_LOGPROBS}"
            )
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise RequestError(f"seed {self.seed} is not between 0 and 2**64 - 1")


class Scores:
    """Scores (n, V) of n positions, which may be part of a larger pass's scores.

    What greedy decoding needs is computed once, for all rows of the pass together.
    """

    def __init__(self, array: mx.array):
        self._whole, self._start, self._stop = _Whole(array), 0, array.shape[0]

    def part(self, start: int, stop: int) -> Scores:
        """Rows start .. stop - 1."""
        part = Scores.__new__(Scores)
        part._whole = self._whole
        part._start, part._stop = self._start + start, self._start + stop
        return part

    def __len__(self) -> int:
        return self._stop - self._start

    def _rows(self, name: str) -> mx.array:
        array: mx.array = getattr(self._whole, name)
        if len(self) == len(array):
            return array
        if len(self) == 1:
            return self._whole.row(name, self._start)
        return array[self._start : self._stop]

    @property
    def array(self) -> mx.array:
        """The scores themselves, (n, V)."""
        return self._rows("array")

    @property
    def best(self) -> mx.array:
        """The tokens (n,) int32 with the highest scores."""
        return self._rows("best")

    @property
    def best_logprobs(self) -> mx.array:
        """The log-probabilities (n,) of the best tokens."""
        return self._rows("best_logprobs")

    @property
    def margins(self) -> mx.array:
        """How far the best score lies above the second best, (n,)."""
        return self._rows("margins")


class _Whole:
    """The scores of a whole pass, which several `Scores` share."""

    def __init__(self, array: mx.array):
        self.array = array
        self._split: dict[str, list[mx.array]] = {}

    def row(self, name: str, i: int) -> mx.array:
        """Row i of the attribute `name`. One operation splits all rows: a batch asks for each."""
        if name not in self._split:
            array = getattr(self, name)
            self._split[name] = list(mx.split(array, len(array)))
        return self._split[name][i]

    @cached_property
    def best(self) -> mx.array:
        return mx.argmax(self.array, axis=-1).astype(mx.int32)

    @cached_property
    def best_logprobs(self) -> mx.array:
        return mx.max(self.array, axis=-1) - mx.logsumexp(self.array, axis=-1)

    @cached_property
    def margins(self) -> mx.array:
        return margin(self.array)


class Context(NamedTuple):
    """The tokens that penalties look back on: the text's last (c,) for the repetition penalty, the
    reply's (g,) for the others; None if the penalty is off."""

    recent: mx.array | None
    reply: mx.array | None


class Sampler:
    """Chooses tokens by `options`; `key` is the random key of the next draw."""

    def __init__(self, options: SamplingOptions | None = None):
        self.options = options or SamplingOptions()
        self.greedy = self.options.temp == 0
        seed = self.options.seed
        self.key = mx.random.key(secrets.randbits(63) if seed is None else seed)
        self._penalty = self.options.repetition_penalty
        if self._penalty == 1:
            self._penalty = None
        self._counts = bool(self.options.presence_penalty or self.options.frequency_penalty)
        bias = self.options.logit_bias or {}
        self._bias = (mx.array([*bias], mx.int32), mx.array([*bias.values()])) if bias else None

    def context(self, tokens: Sequence[int], prompt_length: int) -> Context | None:
        """The tokens of a text that the penalties look back on; None without penalties."""
        recent = reply = None
        if self._penalty is not None:
            last = tokens[-self.options.repetition_context_size :]
            recent = mx.array(list(last), dtype=mx.int32)
        if self._counts:
            reply = mx.array(list(tokens[prompt_length:]), dtype=mx.int32)
        return None if recent is None and reply is None else Context(recent, reply)

    def extend(self, context: Context | None, tokens: mx.array) -> Context | None:
        """`context` followed by `tokens` (any shape)."""
        if context is None:
            return None
        new = tokens.reshape(-1)
        return Context(*(None if c is None else mx.concatenate([c, new]) for c in context))

    def carried(self, context: Context | None = None) -> tuple[mx.array, ...]:
        """What the next token needs from this one: to be computed before another thread may go on,
        which cannot compute what was only planned in this one."""
        arrays = () if context is None else tuple(c for c in context if c is not None)
        return arrays if self.greedy else (self.key, *arrays)

    def process(
        self, scores: Scores, context: Context | None, masks: mx.array | None = None
    ) -> Scores:
        """Scores of n positions with bias and penalties applied, and minus infinity where `masks`
        (n, W) uint32 have a zero bit.

        `context` ends with the token before the last row's prediction, so row i uses all but its
        last n - 1 - i tokens.
        """
        if self._bias:
            tokens, values = self._bias
            scores = Scores(scores.array.at[:, tokens].add(values))
        recent, reply = context or (None, None)
        if recent is not None and self._penalty is not None:
            scores = Scores(self._penalized(scores.array, recent, self._penalty))
        if reply is not None:
            scores = Scores(self._counted(scores.array, reply))
        return scores if masks is None else Scores(masked(scores.array, masks))

    def _counted(self, array: mx.array, reply: mx.array) -> mx.array:
        """Scores with presence and frequency penalties, as OpenAI's API defines them."""
        rows, size = array.shape[0], reply.size
        ends = mx.arange(size - rows + 1, size + 1)[:, None]
        before = (mx.arange(size)[None] < ends).astype(array.dtype)  # (n, g)
        counts = mx.zeros_like(array).at[mx.arange(rows)[:, None], reply[None]].add(before)
        options = self.options
        present = (counts > 0) * options.presence_penalty
        return array - present - counts * options.frequency_penalty

    def _penalized(self, array: mx.array, context: mx.array, penalty: float) -> mx.array:
        """Scores with the repetition penalty of Keskar et al. (2019)."""
        rows = len(array)
        size = min(self.options.repetition_context_size, context.size)
        ends = mx.arange(context.size - rows, context.size)[:, None]
        # While the text is short, the first token fills the missing places; a token seen twice is
        # penalized once.
        seen = context[mx.maximum(ends - mx.arange(size)[None], 0)]  # (n, size)
        chosen = mx.take_along_axis(array, seen, axis=-1)
        chosen = mx.where(chosen < 0, chosen * penalty, chosen / penalty)
        return mx.put_along_axis(array, seen, chosen, axis=-1)

    def log_probs(self, scores: Scores) -> mx.array:
        """Log-probabilities (n, V) of the distribution to draw from at a temperature above 0."""
        # mlx-lm's filters; importing them takes a second, which greedy decoding does not pay.
        from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

        options = self.options
        log_probs = log_softmax(scores.array)
        if 0 < options.top_p < 1:
            log_probs = apply_top_p(log_probs, options.top_p)
        if options.min_p > 0:
            log_probs = apply_min_p(log_probs, options.min_p)
        if 0 < options.top_k < log_probs.shape[-1]:
            log_probs = apply_top_k(log_probs, options.top_k)
        return log_softmax(log_probs / options.temp)

    def draw(self, log_probs: mx.array) -> mx.array:
        """One token (n,) from each row of (n, V)."""
        return mx.random.categorical(log_probs, key=self._next_key())

    def uniform(self, count: int) -> mx.array:
        """Random numbers (count,) in [0, 1)."""
        return mx.random.uniform(shape=(count,), key=self._next_key())

    def _next_key(self) -> mx.array:
        self.key, key = mx.random.split(self.key)
        return key

    def choose(self, scores: Scores) -> tuple[mx.array, mx.array]:
        """A token (n,) for each row of processed scores, and its log-probability (n,)."""
        if self.greedy:
            return scores.best, scores.best_logprobs
        chosen = self.draw(self.log_probs(scores))
        return chosen, logprob_of(scores.array, chosen)

    def alternatives(self, scores: Scores) -> tuple[mx.array, ...]:
        """The `top_logprobs` best tokens (n, k) of each row of processed scores, best first, and
        their log-probabilities (n, k); empty if `top_logprobs` is 0."""
        count = min(self.options.top_logprobs, scores.array.shape[-1])
        if not count:
            return ()
        log_probs = log_softmax(scores.array)
        best = mx.argpartition(-log_probs, kth=count - 1, axis=-1)[:, :count]
        found = mx.take_along_axis(log_probs, best, axis=-1)
        order = mx.argsort(-found, axis=-1)
        return tuple(mx.take_along_axis(part, order, axis=-1) for part in (best, found))


def masked(scores: mx.array, masks: mx.array) -> mx.array:
    """Scores (n, V), with minus infinity where masks (n, ceil(V / 32)) uint32 have a zero bit."""
    rows, size = scores.shape
    bits = (masks[..., None] >> mx.arange(32, dtype=mx.uint32)) & 1
    return mx.where(bits.reshape(rows, -1)[:, :size], scores, -mx.inf)


def logprob_of(scores: mx.array, tokens: mx.array) -> mx.array:
    """The log-probabilities (n,) of tokens (n,) under scores (n, V)."""
    picked = mx.take_along_axis(scores, tokens[:, None], axis=-1)[:, 0]
    return picked - mx.logsumexp(scores, axis=-1)


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """The information content `nats` of a text, in bits for each of its bytes."""
    return nats / log(2) / max(n_bytes, 1)


def margin(scores: mx.array) -> mx.array:
    """How far the best score lies above the second best: (n, V) -> (n,)."""
    best = mx.argmax(scores, axis=-1, keepdims=True)
    others = mx.put_along_axis(scores, best, mx.array(-mx.inf, scores.dtype), axis=-1)
    return mx.max(scores, axis=-1) - mx.max(others, axis=-1)
