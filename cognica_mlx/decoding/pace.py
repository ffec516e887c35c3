"""Whether a mode pays on this machine, and how many drafts a round should make.

- in: measured costs, and the passes that a policy reports while it decodes
- out: what they should have cost, the best draft length, and when to fall back to plain decoding

By costs measured beforehand and not by the clock, so that a run can be repeated.
"""

from __future__ import annotations

from cognica_mlx.costs import Costs

# So many tokens are given a chance before what they have cost is held against the mode.
PATIENCE = 16
# Before any draft has been judged, as if so many of so many had been kept.
PRIOR_KEPT, PRIOR_JUDGED = 6.4, 8


class Pace:
    """Adds up what the passes of one decoding run cost by `costs`; `park` lets it end the mode.

    `spent` is in the unit of the costs, seconds if measured.
    """

    def __init__(self, costs: Costs, *, park: bool = True):
        self.costs, self.park = costs, park
        self.spent = 0.0
        self.tokens = 0
        self.parked: str | None = None
        self._kept, self._judged = PRIOR_KEPT, float(PRIOR_JUDGED)

    def judged(self, kept: int, drafted: int) -> None:
        """Of `drafted` tokens in a row the first `kept` were accepted."""
        self._kept += kept
        self._judged += kept + (kept < drafted)

    @property
    def acceptance(self) -> float:
        """The chance of a draft to be accepted if those before it were."""
        return self._kept / self._judged

    def draft_length(self, most: int, stage: int, draft_step: float) -> int:
        """Up to `most`, the number of drafts at `stage` by which a token should cost least.

        A round of n drafts, each accepted with chance a if those before it were, emits
        1 + a + ... + a^n tokens (Leviathan et al. 2023).
        """
        if not self.park:
            return most
        costs = [self._round(n, stage, draft_step) / self._expected(n) for n in range(1, most + 1)]
        return 1 + costs.index(min(costs)) if costs else 0

    def can_draft(self, most: int, stage: int, draft_step: float) -> bool:
        """Park, saying False, where not even drafts that are all accepted would pay."""
        cost = min(self._round(n, stage, draft_step) / (n + 1) for n in range(1, most + 1))
        return self._weigh(cost)

    def pays(self) -> bool:
        """Park, saying False, where the tokens so far have cost more than plain decoding's."""
        return self.tokens < PATIENCE or self._weigh(self.spent / self.tokens)

    def _weigh(self, token: float) -> bool:
        ratio = token / self.costs.full_token
        if self.park and ratio > 1:
            self.parked = f"a token costs {ratio:.2f} times what it does at full depth"
        return self.parked is None

    def _round(self, drafts: int, stage: int, draft_step: float) -> float:
        verification = self.costs.lower(stage) + self.costs.upper(stage, drafts + 1)
        return drafts * draft_step + verification

    def _expected(self, drafts: int) -> float:
        return sum(self.acceptance**n for n in range(drafts + 1))
