"""One token at a time from a fixed target: the modes full, stage, prefix and compose.

The device never waits for the host: the next token is computed while the last is returned. Its
graph is built first and started only when the last token has been read, so that no cache is written
while still in use. Under a constraint the host waits for each token, which decides the next mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from cognica_mlx.decoding.requests import DecodedToken, Read, Score, Steps, as_row, through, top_of
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
            scores = yield Score(state, self.target)
            scores = sampler.process(scores, context)
            key = sampler.key
            chosen, logprob = sampler.choose(scores)
            token = as_row(chosen)
            context = sampler.extend(context, token)
            ahead = token, logprob, *sampler.alternatives(scores)
            if first:
                # Return the first token without waiting for the second.
                yield self._token((yield Read(state, ahead, sampler.carried(context))))
                first = False
                continue
            numbers = yield Read(state, under_way, (*ahead, *sampler.carried(context)))
            if under_way:
                sequence.key_ahead = key  # the next token has been drawn already
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
            scores = yield Score(state, self.target)
            scores = sampler.process(scores, sequence.context(), sequence.mask())
            chosen, logprob = sampler.choose(scores)
            arrays = as_row(chosen), logprob, *sampler.alternatives(scores)
            token = self._token((yield Read(state, arrays, sampler.carried())))
            sequence.commit(token.token)
            yield token
            if until and until():
                return

    def _token(self, numbers: list[Any]) -> DecodedToken:
        ((token,),), (logprob,), *alternatives = numbers
        return DecodedToken(token, logprob, self.depth, top=top_of(alternatives, 0))
