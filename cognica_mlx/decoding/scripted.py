"""A driver whose scores say what a script has them say, over all the compute of another driver.

Every pass is made and waited for in full, heads included; only the scores are replaced. So a large
model of random weights takes the time that it would take if its stages agreed as a small trained
model's do, and a test can have any draft refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from cognica_mlx.decoding.requests import Request, Score
from cognica_mlx.decoding.single import Driver
from cognica_mlx.sampling import Scores

# What the best token scores, what all others do but the second, and the ids that stand in for the
# token recorded and for one that is wrong.
HIGH, LOW = 50.0, 0.0
RIGHT, WRONG = 1, 2


class Scripted:
    """Another driver, but what `script` returns for a `Score`, (rows, V), is the answer to it."""

    def __init__(self, driver: Driver, script: Callable[[Score], mx.array]):
        self._driver, self._script = driver, script

    def answer(self, request: Request) -> Any:
        """See `Driver`."""
        answer = self._driver.answer(request)
        if not isinstance(request, Score):
            return answer
        # Nothing is taken from the real scores, but they must be there.
        return Scores(self._script(request) + mx.minimum(mx.abs(answer.array[:, :1]), 0))


@dataclass(frozen=True)
class Script:
    """What the stages predict for the tokens after the first `start`, as recorded.

    `hits[k, t]` says whether stage k chooses the token that the full model does, `margins[k, t]` by
    how much its best score leads: those of a `Trace`, of K - 1 stages. The last stage is the full
    model, and always right. After the recording's end its last token is repeated.
    """

    hits: np.ndarray
    margins: np.ndarray
    start: int

    def __call__(self, request: Score) -> mx.array:
        """What the target's deepest stage predicts, (rows, V) float32."""
        state, count, stage = request.state, request.rows, request.target.depth
        said = np.full((count, state.model.config.vocab_size), LOW, dtype=np.float32)
        for row in range(count):
            # The last row predicts the token that the state does not hold yet.
            t = state.length - self.start - count + 1 + row
            t = min(max(t, 0), self.hits.shape[1] - 1)
            full = stage == len(self.hits)
            best, second = (RIGHT, WRONG) if full or self.hits[stage, t] else (WRONG, RIGHT)
            said[row, best] = HIGH
            said[row, second] = HIGH - (1 if full else self.margins[stage, t])
        return mx.array(said)
