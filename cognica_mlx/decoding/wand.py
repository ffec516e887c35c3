"""WAND, adaptive depth: exit at the first stage whose best token can no longer be overtaken.

A token exits at stage k when the margin between the two best scores exceeds
`safety * (bound_k + ... + bound_{K-2})`. Here bound_j is the 99th percentile, measured on a
calibration text, of what the step from stage j to j + 1 takes away from such a margin (or, as
published for the 1.3B base, of how far it moves any logit). Positions that exited early stay
pending in the deeper stages and catch up in one pass when a later token goes deeper.

With a head per stage the full model is the Log-OP of all stages, so the margin is that of the
running Log-OP R_k = pool of stages 0 .. k. The full margin telescopes,
M(R_{K-1}) = M(R_k) - sum over j >= k of (M(R_j) - M(R_{j+1})), so the same rule holds with bounds
measured on the running Log-OP. Bounds for single stages would be far too wide: a step moves the
running Log-OP by only 1 / (j + 2) of the difference to the new stage's log-probabilities,
R_{j+1} - R_j = (l_{j+1} - R_j) / (j + 2) at poe_alpha 0.

The rule is about the best token. With a temperature, a token is drawn from the scores of its exit
stage; use speculation to draw from the full model's distribution.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from cognica_mlx.decoding.choosing import MARGIN, choose_from
from cognica_mlx.decoding.requests import (
    DecodedToken,
    Read,
    Score,
    Steps,
    advance,
    reported,
    top_of,
)
from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.decoding.targets import full_target, stage_target
from cognica_mlx.errors import RequestError
from cognica_mlx.network.model import PoEModel


def exit_margins(model: PoEModel, p99_bounds: Sequence[float], safety: float) -> list[float]:
    """The margins that allow an exit, for each stage but the last: K - 1 numbers.

    Raises RequestError if the bounds do not fit the model.
    """
    steps = model.poe_n_stages - 1
    if len(p99_bounds) != steps:
        raise RequestError(
            f"p99_bounds: {len(p99_bounds)} given, but this model has {steps} steps between stages"
        )
    if not safety >= 0:
        raise RequestError(f"safety {safety} is below 0")
    if not all(bound >= 0 for bound in p99_bounds):
        raise RequestError(f"p99_bounds {list(p99_bounds)} must all be at least 0")
    # An infinite bound stays infinite even at safety 0.
    return [
        float("inf") if float("inf") in p99_bounds[k:] else safety * sum(p99_bounds[k:])
        for k in range(steps)
    ]


class Wand:
    """Advance stage by stage until the margin clears the remaining bounds.

    `exit_stages` limits where a token may exit; heads that decide nothing are not computed.
    """

    def __init__(
        self,
        model: PoEModel,
        p99_bounds: Sequence[float],
        safety: float = 1.0,
        exit_stages: Sequence[int] | None = None,
    ):
        self.depth, self.prefill_stage = model.poe_n_stages - 1, 0
        margins = exit_margins(model, p99_bounds, safety)
        for stage in exit_stages or ():
            model.check_stage(stage, "exit stage")
        allowed = range(self.depth) if exit_stages is None else exit_stages
        self.exits = {k: m for k, m in enumerate(margins) if k in allowed and m < float("inf")}
        # With a head per stage, the pool needs every stage's prediction.
        self._pool = model.pool if model.pools_stages else None
        self._targets = [stage_target(model, k) for k in range(self.depth + 1)]
        self.target = full_target(model)
        if self._pool is None:
            self._targets[-1] = self.target

    def steps(self, sequence: DecodingSequence) -> Steps:
        state, sampler = sequence.state, sequence.sampler
        while sequence.budget and sequence.advice.pays():
            yield from sequence.forced()
            if not sequence.budget:
                return
            state.append(sequence.text[state.length :])
            choice = sampler.choice(MARGIN, state.length, sequence.context(), sequence.mask())
            passed: list[mx.array] = []
            for stage, target in enumerate(self._targets):
                yield from advance(state, stage)
                tested = stage == self.depth or stage in self.exits
                if self._pool is not None:
                    passed.append((yield Score(state, target)))
                if not tested:
                    continue
                if self._pool is not None:
                    chosen = choose_from(self._pool(passed), [choice])
                else:
                    chosen = yield Score(state, target, choice=choice)
                arrays = chosen["margin"], *reported(chosen)
                ((lead,),), ((token,),), ((logprob,),), *best = yield Read(state, arrays)
                if stage == self.depth or lead > self.exits[stage]:
                    break
            sequence.commit(token)
            yield DecodedToken(token, logprob, stage, top=top_of(best, 0))
