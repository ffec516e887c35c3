"""Whether a mode pays on this machine, and how many drafts a round should make.

- in: measured costs, what a driver has spent on the mode, which drafts were kept
- out: the best draft length, and when to fall back to full depth
- `Metered` wraps a driver and prices what passes through, so that modes know nothing of costs

By costs measured beforehand and not by the clock, so that a run can be repeated.
"""

from __future__ import annotations

from typing import Any

from cognica_mlx.costs import Costs
from cognica_mlx.decoding.requests import Advance, Request, Score
from cognica_mlx.decoding.sequence import Mode
from cognica_mlx.decoding.single import Driver
from cognica_mlx.decoding.speculative import Speculative

# Tokens to emit before judging whether a mode pays.
PATIENCE = 16
# Prior: assume 6.4 of 8 drafts were accepted.
PRIOR_KEPT, PRIOR_JUDGED = 6.4, 8


class Pace:
    """Advice to `mode` by `costs`; with `park` it ends a mode that costs more than full depth.

    `spent` is in the unit of the costs, seconds if measured; `tokens` are those of the mode.
    `parked` says why the mode was ended. `others` are the rows of other sequences that share each
    pass, `start` the first position whose passes are the mode's to pay, and not the prompt's.
    """

    def __init__(self, costs: Costs, mode: Mode, *, park: bool = True):
        self.costs, self.park = costs, park
        self.spent = 0.0
        self.tokens = 0
        self.others = 0
        self.start = 0
        self.parked: str | None = None
        # For how many others drafting has been found to pay, if all goes well.
        self._weighed: int | None = None
        self._kept, self._judged = PRIOR_KEPT, float(PRIOR_JUDGED)
        self._mode = mode if isinstance(mode, Speculative) else None

    def begins(self, position: int) -> None:
        """The mode's own positions start here."""
        self.start = position

    def judged(self, kept: int, drafted: int) -> None:
        """Of `drafted` tokens in a row the first `kept` were accepted."""
        self._kept += kept
        self._judged += kept + (kept < drafted)

    def emitted(self) -> None:
        """The mode has made a token."""
        self.tokens += 1

    @property
    def acceptance(self) -> float:
        """The chance of a draft to be accepted if those before it were."""
        return self._kept / self._judged

    def draft_length(self, most: int) -> int:
        """Up to `most`, the number of drafts by which a token should cost least.

        A round of n drafts, each accepted with chance a if those before it were, emits
        1 + a + ... + a^n tokens (Leviathan et al. 2023).
        """
        if not self.park:
            return most
        costs = [self._token(n, self.acceptance) for n in range(1, most + 1)]
        return 1 + costs.index(min(costs)) if costs else 0

    def price(self, request: Request, rows: int | None = None) -> float:
        """What a request costs: its part of a pass or prediction of `rows` rows, or of its own."""
        if isinstance(request, Advance):
            stage = request.index
            # Of what is left of the prompt nothing is counted.
            count = request.count
            own = min(count, max(request.state.filled[stage] + count - self.start, 0))
            total = own if rows is None else rows
            return self.costs.stage(stage, total) * own / total if own else 0.0
        if isinstance(request, Score):
            total = rows or request.rows
            return self.costs.target(request.target, total) * request.rows / total
        return 0.0

    def pays(self) -> bool:
        """Whether the mode should go on. Ends it where even drafts that are all accepted would not
        pay beside so many other rows, or where the tokens so far have cost more than plain
        decoding's."""
        if not self.tokens:
            self.spent = 0.0  # what reading the prompt took is not the mode's
        if not self.park or self.parked:
            return not self.parked
        if self._mode and self.others != self._weighed:
            most = range(1, self._mode.num_draft_tokens + 1)
            self._weigh(min(self._token(n, 1.0) for n in most))
            self._weighed = self.others
        elif self.tokens >= PATIENCE:
            self._weigh(self.spent / self.tokens)
        return self.parked is None

    def _weigh(self, token: float) -> None:
        ratio = token / self._plain_token()
        if ratio > 1:
            self.parked = f"a token costs {ratio:.2f} times what it does at full depth"

    def _plain_token(self) -> float:
        """A token's share of a pass at full depth."""
        rows = 1 + self.others
        return self.costs.full_pass(rows) / rows

    def _token(self, drafts: int, acceptance: float) -> float:
        """What a token costs in rounds of so many drafts, by this sequence's part of each pass."""
        assert self._mode is not None, "only drafting modes ask for this"
        stage, rows = self._mode.draft_stage, drafts + 1
        step = self.costs.lower(stage) + self.costs.target(self._mode.drafter.target)
        # What the other sequences' rows cost without these is not this one's to pay.
        together = self.costs.lower(stage, 1 + self.others) / (1 + self.others)
        behind = self.costs.upper(stage, rows + self.others) * rows / (rows + self.others)
        expected = sum(acceptance**n for n in range(drafts + 1))
        return (drafts * step + together + behind) / expected


class Metered:
    """A driver that prices what one sequence asks of another driver."""

    def __init__(self, driver: Driver, pace: Pace):
        self._driver, self._pace = driver, pace

    def answer(self, request: Request) -> Any:
        """See `Driver`."""
        self._pace.spent += self._pace.price(request)
        return self._driver.answer(request)
