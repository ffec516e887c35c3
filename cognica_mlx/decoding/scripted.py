"""A driver that replaces scores by a script's, after doing all of another driver's work.

Every pass runs in full, heads included; only the scores are replaced. So a large model with random
weights takes as long as it would if its stages agreed like a small trained model's, and a test can
have any draft rejected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from cognica_mlx.decoding.choosing import choose_from
from cognica_mlx.decoding.requests import Request, Score
from cognica_mlx.decoding.single import Driver

# The best token's score, the score of all others, and the ids that stand in for the recorded token
# and for a wrong one.
HIGH, LOW = 50.0, 0.0
RIGHT, WRONG = 1, 2


class Scripted:
    """Another `Driver`, but the scores are the result of `script`, (rows, V)."""

    def __init__(self, driver: Driver, script: Callable[[Score], mx.array]):
        self._driver, self._script = driver, script

    def answer(self, request: Request) -> Any:
        if not isinstance(request, Score):
            return self._driver.answer(request)
        real = self._driver.answer(replace(request, choice=None))
        # Adds 0 from the real scores, so that they must be computed.
        scores = self._script(request) + mx.minimum(mx.abs(real[:, :1]), 0)
        return choose_from(scores, [request.choice]) if request.choice else scores


@dataclass(frozen=True)
class Script:
    """The stages' recorded predictions for the tokens after the first `start`.

    As in a `Trace` of K - 1 stages, `hits[k, t]` says whether stage k chooses the full model's
    token. The last stage is the full model and always right. After the end of the recording its
    last token is repeated.
    """

    hits: np.ndarray
    start: int

    def __call__(self, request: Score) -> mx.array:
        """The prediction of the target's deepest stage, (rows, V) float32."""
        state, count, stage = request.state, request.rows, request.target.depth
        said = np.full((count, state.model.config.vocab_size), LOW, dtype=np.float32)
        for row in range(count):
            # The last row predicts the token after the state's last.
            t = state.length - self.start - count + 1 + row
            t = min(max(t, 0), self.hits.shape[1] - 1)
            right = stage == len(self.hits) or self.hits[stage, t]
            said[row, RIGHT if right else WRONG] = HIGH
        return mx.array(said)
