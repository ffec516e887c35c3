"""Drafts decided as recorded from a small trained model, over another model's compute.

Every pass is made in full, heads included; only what the scores say is replaced, so that each draft
is as sure, and kept or refused, as the recording has it. What comes out is the time that a model of
this size would take if its stages agreed as the small model's do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from cognica_mlx.decoding.speculative import Speculative
from cognica_mlx.decoding.targets import Target
from cognica_mlx.model import Hidden
from cognica_mlx.replay import Trace
from cognica_mlx.state import DecodingState

# What the best token scores, what all others do but the second, and the ids that stand in for the
# token recorded and for one that is wrong.
HIGH, LOW = 50.0, 0.0
RIGHT, WRONG = 1, 2


@dataclass(frozen=True)
class Script:
    """A recording laid along what `state` decodes after `start` tokens."""

    trace: Trace
    state: DecodingState
    start: int

    def direct(self, policy: Speculative) -> None:
        """Make `policy` draft, keep and refuse as recorded."""
        stage = policy.draft_stage
        hits, margins = self.trace.draft_hits[stage], self.trace.draft_margins[stage]
        policy.drafter = self._replaced(policy.drafter, hits, margins)
        policy.target = self._replaced(policy.target, np.ones_like(hits), np.ones_like(margins))

    def _replaced(self, target: Target, hits: np.ndarray, margins: np.ndarray) -> Target:
        def scores(hidden: Mapping[int, Hidden]) -> mx.array:
            real = target.scores(hidden)
            count, size = real.shape[1:]
            # The last row predicts the token that the state does not hold yet.
            first = self.state.length - self.start - count + 1
            said = np.full((count, size), LOW, dtype=np.float32)
            for row in range(count):
                t = min(max(first + row, 0), len(hits) - 1)
                best, second = (RIGHT, WRONG) if hits[t] else (WRONG, RIGHT)
                said[row, best], said[row, second] = HIGH, HIGH - margins[t]
            # Nothing is taken from the real scores, but they must be there.
            nothing = mx.minimum(mx.abs(real[..., :1]), 0)
            return mx.array(said)[None] + nothing

        return Target(target.boundaries, scores)
