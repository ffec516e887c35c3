"""One token at a time from a fixed target: the modes full, stage, prefix and compose.

The host never waits for the token that the device works on: the next one is under way while the
last is handed out.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from cognica_mlx.decoding.loop import DecodedToken, advance_through, as_row
from cognica_mlx.decoding.targets import Target
from cognica_mlx.sampling import Sampler, logprob_of
from cognica_mlx.state import DecodingState


class Plain:
    """Advance every stage that `target` reads for each token; deeper ones stay empty."""

    drafted = 0

    def __init__(self, target: Target, sampler: Sampler):
        self.target, self.sampler = target, sampler
        self.depth = self.prefill_stage = target.depth

    def run(self, state: DecodingState, token: int, budget: int) -> Iterator[DecodedToken]:
        """Emit `budget` tokens."""
        context = self.sampler.context([*state.tokens, token])
        chosen, logprob = self._step(state, as_row(token), context)
        for remaining in range(budget - 1, -1, -1):
            current = chosen, logprob
            if remaining:
                context = self.sampler.extend(context, chosen)
                chosen, logprob = self._step(state, chosen, context)
            yield DecodedToken.read(*current, self.depth)

    def _step(
        self, state: DecodingState, token: mx.array, context: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        state.append(token)
        scores = self.target.scores(advance_through(state, self.depth))[:, -1]
        scores = self.sampler.process(scores, context)
        chosen = self.sampler.choose(scores)
        logprob = logprob_of(scores, chosen)
        mx.async_eval(chosen, logprob)
        return as_row(chosen), logprob
