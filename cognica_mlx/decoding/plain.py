"""One token at a time from a fixed target: the modes full, stage, prefix and compose.

The device never waits for the host: the next token is computed while the last is returned. Its
graph is built first and started only when the last token has been read, so that no cache is written
while still in use. Under a constraint the host waits for each token, which decides the next mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from cognica_mlx.decoding.choosing import TOKEN
from cognica_mlx.decoding.requests import (
    DecodedToken,
    Read,
    Score,
    Steps,
    as_row,
    reported,
    through,
    top_of,
)
from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.decoding.targets import Target


class Plain:
    """Advance every stage that `target` reads for each token; deeper ones stay empty."""

    def __init__(self, target: Target):
        self.target = target
        self.depth = self.prefill_stage = target.depth

    def steps(self, sequence: DecodingSequence, until: Callable[[], bool] | None = None) -> Steps:
        """Emit tokens until the budget is used up. `until` is called after each; once it returns
        true, one more token is emitted."""
        if sequence.constraint:
            yield from self._constrained(sequence, until)
            return
        state, sampler = sequence.state, sequence.sampler
        context = sequence.context()
        token = as_row(sequence.text[-1])
        under_way: tuple[mx.array, ...] = ()
        first = True
        while sequence.budget > bool(under_way) and not (until and not first and until()):
            state.append(token)
            yield from through(state, self.depth)
            choice = sampler.choice(TOKEN, state.length, context)
            chosen = yield Score(state, self.target, choice=choice)
            token, ahead = chosen["token"], reported(chosen)
            # Computed before another thread may go on: that one cannot compute what was only
            # planned in this one.
            context = {name: chosen[name] for name in context}
            if first:
                # Return the first token without waiting for the second.
                yield self._token((yield Read(state, ahead, (*context.values(),))))
                first = False
                continue
            numbers = yield Read(state, under_way, (*ahead, *context.values()))
            if under_way:
                yield self._token(numbers)
            under_way = ahead
        if under_way:
            yield self._token((yield Read(state, under_way)))

    def _constrained(self, sequence: DecodingSequence, until: Callable[[], bool] | None) -> Steps:
        """Emit one token after another, but forced tokens all at once."""
        state, sampler = sequence.state, sequence.sampler
        while True:
            yield from sequence.forced()
            if not sequence.budget:
                return
            state.append(sequence.text[state.length :])
            yield from through(state, self.depth)
            context, mask = sequence.context(), sequence.mask()
            choice = sampler.choice(TOKEN, state.length, context, mask)
            chosen = yield Score(state, self.target, choice=choice)
            token = self._token((yield Read(state, reported(chosen))))
            sequence.commit(token.token)
            yield token
            if until and until():
                return

    def _token(self, numbers: list[Any]) -> DecodedToken:
        ((token,),), ((logprob,),), *best = numbers
        return DecodedToken(token, logprob, self.depth, top=top_of(best, 0))
