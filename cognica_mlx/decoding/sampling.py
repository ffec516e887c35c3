"""How a sequence's tokens are chosen: options, penalties' contexts, and a seeded random source.

A `Sampler` says how a sequence's rows are chosen from; `choosing` does it.

Random numbers are made on the host: a hash of the seed, the position in the text and the purpose.
So a text is drawn alike alone, in a batch and after an interruption. Speculation may make a number
several times, for drafts behind a rejected one; but such a draft was never judged, and nothing was
decided by its number. For the text each number decides once, so the numbers that decide are
independent of each other, and the output has the full model's distribution.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from math import isfinite, log
from struct import Struct

import mlx.core as mx
import numpy as np

from cognica_mlx.decoding.choosing import DRAFT, MARGIN, TOKEN, VERDICT, Choice, Context, How
from cognica_mlx.errors import RequestError

# Scores divided by less than this overflow; divided by more, they are all equal in float32.
MIN_TEMP, MAX_TEMP = 1e-6, 1e6
MAX_TOP_LOGPROBS = 100

# What a random number decides: a token that the target chooses, a draft, a draft's acceptance.
CHOSEN, DRAFTED, ACCEPTED = range(3)
PURPOSES: dict[str, tuple[int, ...]] = {
    TOKEN: (CHOSEN,),
    MARGIN: (CHOSEN,),
    DRAFT: (DRAFTED,),
    VERDICT: (CHOSEN, ACCEPTED),
}
_SOURCE = Struct("<QQB")


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


_how = cache(How)  # equal ones are one object, which is quick to compare


class Sampler:
    """Chooses a sequence's tokens by `options`."""

    def __init__(self, options: SamplingOptions | None = None):
        self.options = options = options or SamplingOptions()
        self.greedy = options.temp == 0
        self._seed = secrets.randbits(64) if options.seed is None else options.seed
        # The numbers that are the same for all tokens.
        self._fixed: dict[str, float] = {}
        if options.repetition_penalty not in (None, 1):
            self._fixed["repetition"] = options.repetition_penalty
        if options.presence_penalty or options.frequency_penalty:
            self._fixed["presence"] = options.presence_penalty
            self._fixed["frequency"] = options.frequency_penalty
        if not self.greedy:
            self._fixed["temp"] = options.temp
            if 0 < options.top_p < 1:
                self._fixed["top_p"] = options.top_p
            if options.min_p > 0:
                self._fixed["min_p"] = options.min_p
        self._bias: dict[str, mx.array] = {}
        if bias := options.logit_bias:
            self._bias["biased"] = mx.array([[*bias]], mx.int32)
            self._bias["biases"] = mx.array([[*bias.values()]], mx.float32)

    def context(
        self, tokens: Sequence[int], prompt_length: int, vocab_size: int, most: int
    ) -> Context:
        """The context after `tokens`, of a text of up to `most`; empty without penalties."""
        context: Context = {}
        if "repetition" in self._fixed:
            # Wide enough for the whole text is enough; texts of similar lengths get equal widths.
            width = min(self.options.repetition_context_size, 1 << (most - 1).bit_length())
            last = list(tokens[-width:])
            # While the text is short, its first token fills the missing places; a token seen twice
            # is penalized once.
            context["recent"] = mx.array([[last[0]] * (width - len(last)) + last], mx.int32)
        if "presence" in self._fixed:
            reply = np.array(tokens[prompt_length:], np.int64)
            counts = np.bincount(reply, minlength=vocab_size).astype(np.float32)
            context["counts"] = mx.array(counts[None])
        return context

    def number(self, position: int, purpose: int) -> float:
        """The random number in [0, 1) for a purpose at a position of the text."""
        source = _SOURCE.pack(self._seed, position, purpose)
        # 24 bits: all that float32 tells apart near 1.
        return int.from_bytes(blake2b(source, digest_size=3).digest(), "little") / 2**24

    def choice(
        self,
        goal: str,
        position: int,
        context: Context,
        masks: mx.array | None = None,
        drafts: Mapping[str, mx.array] | None = None,
        rows: int = 1,
    ) -> Choice:
        """How to choose the tokens at `position` and the `rows` - 1 positions behind it.

        `context` has a row for each, and so have `masks` (n, W) uint32, which forbid the tokens
        with a zero bit, and `drafts` for a VERDICT: `drafted` (n, 1) int32, -1 in the last row, and
        unless greedy `q` (n, V), their distributions, 0 in the last row.
        """
        options, operands = self.options, {**context, **(drafts or {})}
        for name, array in self._bias.items():
            operands[name] = mx.repeat(array, rows, axis=0) if rows > 1 else array
        if masks is not None:
            operands["masks"] = masks
        names, fixed, purposes = (*self._fixed,), (*self._fixed.values(),), PURPOSES[goal]
        if self.greedy:
            purposes = ()
        names += ("draw", "accept")[: len(purposes)]
        numbers = [
            (*fixed, *(self.number(position + row, purpose) for purpose in purposes))
            for row in range(rows)
        ]
        how = _how(
            goal,
            names,
            0 if self.greedy else options.top_k,
            0 if goal == DRAFT else options.top_logprobs,
            context["recent"].shape[1] if "recent" in context else 0,
            len(options.logit_bias or ()),
            masks is not None,
        )
        return Choice(how, operands, numbers)


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """The information content `nats` of a text, in bits for each of its bytes."""
    return nats / log(2) / max(n_bytes, 1)
