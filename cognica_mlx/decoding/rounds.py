"""What a round of speculation costs a token, by what it drafts, and which round is best.

- in: costs of the parts, drafters, how many rows of other sequences share each pass
- out: for a plan its cost a token; the plan with the least

A round of n drafts, each accepted with chance a if those before it were, emits 1 + a + ... + a^n
tokens (Leviathan et al. 2023); where m tokens looked up come first, of chance b, it emits
1 + b + ... + b^m, and then b^m (a + ... + a^n). Which drafter and how many are chosen anew for
every round, as DEL (arXiv 2504.05598) does for the layer to leave at.

Where other machines verify, the next n drafts are made at the same time, together with a guess at
the full model's own token. They are used with chance b^m a^(n+1); otherwise n drafts are made anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from cognica_mlx.costs import Costs
from cognica_mlx.decoding.drafters import StageDrafter
from cognica_mlx.decoding.sequence import Plan

# Plain decoding has the next token under way while this one is handed out, which a round has not:
# it must promise a token for less than this part of what plain decoding takes.
WORTH_LEAVING = 0.9


class RoundCosts:
    """Rounds beside `others` rows of other sequences; a sequence pays its part of a shared pass.
    With `overlaps` drafting goes on while other machines verify."""

    def __init__(
        self,
        costs: Costs,
        drafters: Sequence[StageDrafter],
        others: int = 0,
        overlaps: bool = False,
    ):
        self.costs, self.drafters, self.others = costs, drafters, others
        self.overlaps = overlaps
        self.plain = self._share(costs.full_pass, 1)
        # Of each drafter, by rows: the first draft's pass; what verifies.
        self._first: list[dict[int, float]] = [{} for _ in drafters]
        self._verify: list[dict[int, float]] = [{} for _ in drafters]
        self._full: dict[int, float] = {1: self.plain}

    def _share(self, cost: Callable[[int], float], rows: int) -> float:
        total = rows + self.others
        return cost(total) * rows / total

    def _full_pass(self, rows: int) -> float:
        if rows not in self._full:
            self._full[rows] = self._share(self.costs.full_pass, rows)
        return self._full[rows]

    def cost(self, plan: Plan, reused: float = 0.0) -> float:
        """What the round costs; `reused` is the chance that what is drafted meanwhile is used."""
        rows = plan.looked_up + plan.count + 1
        if not plan.count:
            return self._full_pass(rows)
        which = plan.drafter
        first, verify = self._first[which], self._verify[which]
        drafter, ahead = self.drafters[which], plan.looked_up + 1
        for count in (1, ahead):
            if count not in first:
                first[count] = self._draft(drafter, count)
        if rows not in verify:
            verify[rows] = self._verification(drafter, rows)
        drafting = first[ahead] + (plan.count - 1) * first[1]
        if not (self.overlaps and drafter.goes_on):
            return drafting + verify[rows]
        meanwhile = (plan.count + 1) * first[1] - self.hidden(which, rows, plan.count)
        # Drafts made meanwhile have all been run through the drafter's stages, the last one too.
        saved = drafting + self._share(partial(self.costs.lower, drafter.target.depth), 1)
        return drafting + verify[rows] + meanwhile - reused * saved

    def hidden(self, which: int, rows: int, count: int) -> float:
        """What costs no time of a guess and `count` drafts that are made while other machines run
        `rows` positions."""
        drafter = self.drafters[which]
        above = partial(self.costs.between, drafter.target.depth)
        return min((count + 1) * self._draft(drafter, 1), self._share(above, rows))

    def _draft(self, drafter: StageDrafter, rows: int) -> float:
        """The pass of a draft behind so many rows, and its prediction."""
        costs = self.costs
        if drafter.prefix and (own := costs.rounded):
            return own.lower(len(own.stages) - 1, rows) + own.full_head()
        return costs.lower(drafter.target.depth, rows) + costs.target(drafter.target)

    def _verification(self, drafter: StageDrafter, rows: int) -> float:
        if drafter.prefix:
            return self._full_pass(rows)
        # Its own stages have run the drafts already, but for the last.
        stage = drafter.target.depth
        below, above = partial(self.costs.lower, stage), partial(self.costs.upper, stage)
        return self._share(below, 1) + self._share(above, rows)

    def best_lookup(self, offered: int, hits: float) -> tuple[Plan, float]:
        """The best round of looked-up tokens alone, and what a token costs in it; nothing is
        looked up where plain decoding costs little more."""
        best, least, tokens, likely = Plan(), WORTH_LEAVING * self.plain, 1.0, 1.0
        for count in range(1, offered + 1):
            likely *= hits
            tokens += likely
            if (cost := self._full_pass(count + 1) / tokens) < least:
                best, least = Plan(count), cost
        return best, least if best else self.plain

    def best(
        self, looked_up: int, hits: float, most: int, rates: Sequence[float]
    ) -> tuple[Plan, float]:
        """The best round with a drafter, alone or behind so many tokens looked up, and what a token
        costs in it; `rates` are the drafters' acceptances."""
        best, least = Plan(), float("inf")
        for ahead in {0, looked_up}:
            before, reached = sum(hits**i for i in range(ahead + 1)), hits**ahead
            for which, rate in enumerate(rates):
                tokens, likely = before, reached
                for count in range(1, most + 1):
                    likely *= rate
                    tokens += likely
                    plan = Plan(ahead, which, count)
                    if (cost := self.cost(plan, likely * rate) / tokens) < least:
                        best, least = plan, cost
        return best, least
