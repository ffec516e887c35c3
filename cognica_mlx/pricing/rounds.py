"""The cost per token of a round of speculation, by what it drafts, and the best round.

- in: costs of the parts, drafters, how many rows of other sequences share each pass
- out: a plan's cost; the plan with the lowest cost per token

A round of n drafts, each accepted with probability a if those before it were, emits
1 + a + ... + a^n tokens (Leviathan et al. 2023). If m looked-up tokens come first, each accepted
with probability b, it emits 1 + b + ... + b^m + b^m (a + ... + a^n). The drafter and the number of
drafts are chosen for every round, as DEL (arXiv 2504.05598) chooses the exit layer.

While other machines verify, a guess at the full model's own token and the next n drafts are made.
They are used with probability b^m a^(n+1); otherwise the next round drafts anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

from cognica_mlx.decoding.advice import Plan
from cognica_mlx.decoding.drafters import StageDrafter
from cognica_mlx.pricing.costs import Costs

# Plain decoding computes the next token while it returns this one, and a round does not. So a round
# must promise a token for less than this share of plain decoding's cost.
WORTH_LEAVING = 0.9


class RoundCosts:
    """Costs of rounds that share passes with `others` rows of other sequences; a sequence pays for
    its share of a pass."""

    def __init__(self, costs: Costs, drafters: Sequence[StageDrafter], others: int = 0):
        self.costs, self.drafters, self.others = costs, drafters, others
        # Costs by rows, computed once.
        self._full_pass = cache(partial(self._share, costs.full_pass))
        self._draft, self._verify = cache(self._draft_cost), cache(self._verification)
        self.plain = self._full_pass(1)

    def _share(self, cost: Callable[[int], float], rows: int) -> float:
        total = rows + self.others
        return cost(total) * rows / total

    def cost(self, plan: Plan, reused: float | None = None) -> float:
        """The cost of a round. `reused` is the probability that drafts made while other machines
        verify are used; None if a drafter waits for them."""
        rows = plan.looked_up + plan.count + 1
        if not plan.count:
            return self._full_pass(rows)
        drafter = self.drafters[plan.drafter]
        one = self._draft(drafter, 1)
        drafting = self._draft(drafter, plan.looked_up + 1) + (plan.count - 1) * one
        verifying = self._verify(drafter, rows)
        if reused is None or not drafter.goes_on:
            return drafting + verifying
        meanwhile = (plan.count + 1) * one - self.hidden(plan.drafter, rows, plan.count)
        # The last draft has also been run through the drafter's stages already.
        saved = drafting + self._share(partial(self.costs.lower, drafter.target.depth), 1)
        return drafting + verifying + meanwhile - reused * saved

    def hidden(self, which: int, rows: int, count: int) -> float:
        """The part of the cost of a guess and `count` drafts that overlaps with other machines'
        pass of `rows` positions."""
        drafter = self.drafters[which]
        above = partial(self.costs.between, drafter.target.depth)
        return min((count + 1) * self._draft(drafter, 1), self._share(above, rows))

    def _draft_cost(self, drafter: StageDrafter, rows: int) -> float:
        """The cost of drafting one token in a pass of `rows` rows, including its prediction."""
        costs = self.costs
        if drafter.prefix and (own := costs.rounded):
            return own.lower(len(own.stages) - 1, rows) + own.full_head()
        return costs.lower(drafter.target.depth, rows) + costs.target(drafter.target)

    def _verification(self, drafter: StageDrafter, rows: int) -> float:
        if drafter.prefix:
            return self._full_pass(rows)
        # The drafter's stages have already run all drafts but the last.
        stage = drafter.target.depth
        below, above = partial(self.costs.lower, stage), partial(self.costs.upper, stage)
        return self._share(below, 1) + self._share(above, rows)

    def best_lookup(self, offered: int, hits: float) -> tuple[Plan, float]:
        """The best round of looked-up tokens alone, and its cost per token. The plan is empty if it
        would be little cheaper than plain decoding."""
        best, least, tokens, likely = Plan(), WORTH_LEAVING * self.plain, 1.0, 1.0
        for count in range(1, offered + 1):
            likely *= hits
            tokens += likely
            if (cost := self._full_pass(count + 1) / tokens) < least:
                best, least = Plan(count), cost
        return best, least if best else self.plain

    def best(
        self,
        looked_up: int,
        hits: float,
        most: int,
        rates: Sequence[float],
        meanwhile: bool = False,
    ) -> tuple[Plan, float]:
        """The best round with a drafter, alone or after `looked_up` tokens, and its cost per token;
        `rates` are the drafters' acceptance rates. With `meanwhile`, drafting goes on while other
        machines verify."""
        best, least = Plan(), float("inf")
        for ahead in {0, looked_up}:
            before, reached = sum(hits**i for i in range(ahead + 1)), hits**ahead
            for which, rate in enumerate(rates):
                tokens, likely = before, reached
                for count in range(1, most + 1):
                    likely *= rate
                    tokens += likely
                    plan = Plan(ahead, which, count)
                    reused = likely * rate if meanwhile else None
                    if (cost := self.cost(plan, reused) / tokens) < least:
                        best, least = plan, cost
        return best, least
