"""Whether a mode pays on this machine, which drafter a round should use, and how many drafts.

- in: measured costs, what a driver has spent on the mode, which drafts were accepted
- out: a plan for each round, and when to fall back to full depth
- `Metered` wraps a driver and prices its requests, so that modes know nothing about costs

It uses costs measured beforehand, not the clock, so that runs are reproducible.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from cognica_mlx.decoding.advice import Advice, Plan
from cognica_mlx.decoding.lookup import NGRAMS
from cognica_mlx.decoding.passes import course
from cognica_mlx.decoding.requests import Advance, Request, Score
from cognica_mlx.decoding.sequence import Mode
from cognica_mlx.decoding.single import Driver
from cognica_mlx.decoding.speculative import Speculative
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.costs import Costs, with_bytes_of
from cognica_mlx.pricing.rounds import RoundCosts

# Gives a model's costs in a mode, including those of its quantized copy.
KnownCosts = Callable[[PoEModel, Mode], Costs]

# Tokens to emit before judging whether a mode pays.
PATIENCE = 16
# Prior: assume 6.4 of 8 drafts were accepted; fewer of looked-up tokens, the shorter the match.
PRIOR_KEPT, PRIOR_JUDGED = 6.4, 8.0
PRIOR_HITS = dict(zip(NGRAMS, (0.6, 0.4, 0.2), strict=True))
# Acceptance is estimated from about this many recent drafts.
MEMORY = 64
# Tokens at full depth before the mode is tried again: at first, then doubled after each failure up
# to the maximum.
WAIT, LONGEST_WAIT = 64, 1024


class _Record:
    """How often a drafter's tokens were accepted, weighted toward the latest."""

    def __init__(self, kept: float, judged: float):
        self.kept, self.judged = kept, judged

    def add(self, kept: int, judged: int) -> None:
        """Count `judged` more drafts, `kept` of them accepted."""
        self.kept += kept
        self.judged += judged
        if self.judged > MEMORY:
            self.kept, self.judged = self.kept * MEMORY / self.judged, MEMORY

    @property
    def rate(self) -> float:
        """The probability that a draft is accepted if those before it were."""
        return self.kept / self.judged


class Pace(Advice):
    """Advice to `mode` from `costs`; with `falls_back` it ends a mode that costs more than full
    depth.

    `spent` is in the unit of the costs (seconds if measured); `tokens` counts the mode's tokens.
    `fell_back` says why decoding fell back to full depth; modes that draft are tried again later.
    `others` is the number of other sequences' rows in each pass. Passes over positions before
    `start` belong to the prompt and are not charged to the mode.
    """

    def __init__(self, costs: Costs, mode: Mode, *, falls_back: bool = True):
        drafting = mode if isinstance(mode, Speculative) else None
        if drafting and drafting.prefix and not costs.rounded:
            costs = with_bytes_of(costs, drafting.prefix)
        self.costs, self.falls_back = costs, falls_back
        self.spent = 0.0
        self.tokens = 0
        self.others = 0
        self.start = 0
        self.fell_back: str | None = None
        self._drafting = drafting
        self._rounds: RoundCosts | None = None
        self._records: dict[Hashable, _Record] = {}
        # Recent spending and the tokens it bought; and the totals at the start of the current
        # round, if one is under way.
        self._trial = 0.0, 0
        self._round: tuple[float, int] | None = None
        self._wait = WAIT
        self._resumes: int | None = None
        # The number of other sequences when the mode fell back.
        self._among = 0

    def begins(self, position: int) -> None:
        self.start = position

    def judged(self, drafter: str, kept: int, drafted: int) -> None:
        self._record(drafter).add(kept, kept + (kept < drafted))

    def drafted_meanwhile(self, drafter: int, rows: int, count: int) -> None:
        # Only the time that does not overlap is charged.
        self.spent -= self._at_hand().hidden(drafter, rows, count)

    def observed(self, agreeing: int, hit: bool) -> None:
        self._record(agreeing).add(hit, 1)

    def emitted(self) -> None:
        self.tokens += 1

    def acceptance(self, drafter: str | int) -> float:
        """The probability that a draft is accepted if those before it were: for a drafter by name,
        or for looked-up tokens by the length of the match."""
        return self._record(drafter).rate

    def _record(self, drafter: str | int) -> _Record:
        prior = PRIOR_KEPT, PRIOR_JUDGED
        if isinstance(drafter, int):
            prior = PRIOR_HITS[drafter], 1.0
        return self._records.setdefault(drafter, _Record(*prior))

    def price(self, request: Request, rows: int | None = None, length: int = 1) -> float:
        """A request's cost: its share of a pass, through `length` stages, or prediction of `rows`
        rows, by default its own rows only."""
        if isinstance(request, Advance):
            stage = request.index
            # Positions left over from the prompt are not counted.
            count = request.count
            own = min(count, max(request.state.filled[stage] + count - self.start, 0))
            total = own if rows is None else rows
            costs = (request.stage.scheme and self.costs.rounded) or self.costs
            whole = sum(costs.stage(stage + later, total) for later in range(length))
            return whole * own / total if own else 0.0
        if isinstance(request, Score):
            total = rows or request.rows
            if request.target.scheme and self.costs.rounded:
                whole = self.costs.rounded.full_head(total)
            else:
                whole = self.costs.target(request.target, total)
            return whole * request.rows / total
        return 0.0

    def plan(self, offered: int, agreeing: int, most: int, meanwhile: bool = False) -> Plan:
        """What to draft in the next round, for the lowest expected cost per token.

        If no drafter would pay, the mode falls back for a while, and `fell_back` says why.
        """
        if not self.falls_back:
            return super().plan(offered, agreeing, most, meanwhile)
        self._account()
        rounds = self._at_hand()
        hits = self.acceptance(agreeing) if offered else 0.0
        plan, token = rounds.best_lookup(offered, hits)
        if self._waits() or not most:
            return plan
        rates = [self.acceptance(drafter.name) for drafter in rounds.drafters]
        drafting, cost = rounds.best(plan.looked_up, hits, most, rates, meanwhile)
        if cost < rounds.plain:
            self.fell_back = None
        elif not plan:
            self._give_up(cost / rounds.plain)
        if cost >= token:
            return plan
        self._round = self.spent, self.tokens
        return drafting

    def pays(self) -> bool:
        """Whether the mode should go on: not if its recent tokens have cost more than plain
        decoding."""
        if not self.falls_back:
            return True
        self._account()
        if self._waits():
            return False
        self.fell_back = None
        self._round = self.spent, self.tokens
        return True

    def _account(self) -> None:
        """Add the latest round's cost, and fall back if the mode costs too much."""
        if not self.tokens:
            self.spent = 0.0  # reading the prompt is not charged to the mode
        if self._round:
            spent, tokens = self._trial
            before, made = self._round
            self._trial = spent + self.spent - before, tokens + self.tokens - made
            self._round = None
        spent, tokens = self._trial
        if tokens > MEMORY:
            self._trial = 0.0, 0
        elif tokens >= PATIENCE and (ratio := spent / tokens / self._at_hand().plain) > 1:
            self._give_up(ratio)

    def _waits(self) -> bool:
        """Whether it is too early to try again. It is not if other sequences came or went."""
        if self._resumes is None:
            return False
        if self.tokens < self._resumes and self.others == self._among:
            return True
        for name in [key for key in self._records if isinstance(key, str)]:
            del self._records[name]
        self._resumes = None
        return False

    def _give_up(self, ratio: float) -> None:
        self.fell_back = f"a token costs {ratio:.2f} times as much as at full depth"
        self._resumes, self._among = self.tokens + self._wait, self.others
        self._trial = 0.0, 0
        self._wait = min(2 * self._wait, LONGEST_WAIT)

    def _at_hand(self) -> RoundCosts:
        if self._rounds is None or self._rounds.others != self.others:
            drafters = self._drafting.drafters if self._drafting else ()
            self._rounds = RoundCosts(self.costs, drafters, self.others)
        return self._rounds


def pace_for(model: PoEModel, mode: Mode, costs: Costs | KnownCosts | None) -> Pace | None:
    """Advice from `costs`, or from what they return for this mode; None without costs."""
    if costs is None:
        return None
    return Pace(costs if isinstance(costs, Costs) else costs(model, mode), mode)


class Metered:
    """A `Driver` that prices one sequence's requests and passes them to another driver."""

    def __init__(self, driver: Driver, pace: Pace):
        self._driver, self._pace = driver, pace

    def answer(self, request: Request) -> Any:
        length = course([request]) if isinstance(request, Advance) else 1
        self._pace.spent += self._pace.price(request, length=length)
        return self._driver.answer(request)
