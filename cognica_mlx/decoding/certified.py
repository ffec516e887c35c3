"""Certified speculation: drafts that WAND would let go are kept, only the others are verified.

A draft whose margin clears the bounds that remain after the draft stage is certified: the deeper
stages would hardly overturn it. A block of certified drafts is emitted at once, and its positions
stay pending in the deeper stages. A block with an uncertified draft is verified as a whole, in one
batch with all that is pending; its certified drafts count as accepted.

A block of drafts is one graph and one host synchronisation, and so is a verification; only where
`draft_margin` stops drafting does the host look at each draft.
The output agrees with the full model's as often as WAND's does; with a temperature, certified
drafts are drawn from the draft stage's distribution and the others follow the full model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx

from cognica_mlx.decoding.loop import DecodedToken, number
from cognica_mlx.decoding.pace import Pace
from cognica_mlx.decoding.speculative import Speculative
from cognica_mlx.decoding.wand import exit_margins
from cognica_mlx.errors import RequestError
from cognica_mlx.model import PoEModel
from cognica_mlx.sampling import Sampler
from cognica_mlx.state import DecodingState


class Certified(Speculative):
    """Speculation that verifies only where the draft's margin does not clear WAND's bounds."""

    def __init__(
        self,
        model: PoEModel,
        sampler: Sampler,
        p99_bounds: Sequence[float],
        safety: float = 1.0,
        draft_stage: int = 0,
        num_draft_tokens: int = 3,
        draft_margin: float | None = None,
        draft_rank: int | None = None,
        pace: Pace | None = None,
    ):
        # The bounds are about the stage's own prediction. A shortlist's logits are exact, and so is
        # the margin between its best two.
        super().__init__(
            model,
            sampler,
            draft_stage,
            num_draft_tokens,
            draft_margin,
            "base",
            draft_rank=draft_rank,
            pace=pace,
        )
        if draft_stage == self.depth:
            raise RequestError(
                f"draft_stage {draft_stage} is the last one: nothing is left to skip"
            )
        self.needed = exit_margins(model, p99_bounds, safety)[draft_stage]
        self.prefill_stage = draft_stage

    def run(self, state: DecodingState, token: int, budget: int) -> Iterator[DecodedToken]:
        """Emit at least `budget` tokens, a block at a time."""
        tokens = [*state.tokens, token]
        emitted = 0
        while emitted < budget:
            if self.pace and not self.pace.pays():
                yield from self.plainly(state, tokens[-1], budget - emitted)
                return
            count = min(self.num_draft_tokens, budget - emitted)
            draft = self.draft(state, tokens, count, self.draft_margin)
            mx.eval(draft.tokens, draft.logprobs, draft.margins)
            certified = [number(lead) > self.needed for lead in draft.margins]
            if all(certified) and not draft.stopped:
                self.drafted += len(draft)
                decoded = [
                    DecodedToken.read(drafted, logprob, self.draft_stage, from_draft=True)
                    for drafted, logprob in zip(draft.tokens, draft.logprobs, strict=True)
                ]
            else:
                decoded = self.verify(state, tokens[-1], draft, certified)
            for one in self.emitted(decoded):
                yield one
                tokens.append(one.token)
                emitted += 1
