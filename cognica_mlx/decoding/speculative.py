"""Self-speculation: a drafter drafts, the full model verifies the drafts in one pass.

Drafts come from the model's own first stages, from a quantized copy of them, or are looked up in
the text. A round may start with looked-up tokens and go on with a stage drafter; advice decides
which drafter and how many tokens. Drafts of the model's own stages have the real keys, values and
activations, so verification only runs the other stages on them. Other drafts run through all
stages. Rejected drafts are rolled back.

Greedy output is the full model's. With a temperature a draft x is accepted with probability
min(1, p(x) / q(x)) and a rejected one is replaced by a draw from max(p - q, 0) (Leviathan et al.
2023, Chen et al. 2023), so the output has the full model's distribution; p and q pass through the
same penalties and filters. While drafting does not pay, the full model decodes token by token as in
mode `full`.

The host waits once for each verification.

While other machines verify, this one goes on drafting (Butler et al. 2024, PipeInfer): it guesses
the full model's token after the block and drafts the next block after the guess. If a draft is
rejected or the guess is wrong, all of that is rolled back.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import mlx.core as mx

from cognica_mlx.decoding.advice import Advice, Plan
from cognica_mlx.decoding.constraint import Constraint
from cognica_mlx.decoding.drafters import FORCED, LOOKED_UP, Draft, StageDrafter, begin
from cognica_mlx.decoding.lookup import MOST, Lookup
from cognica_mlx.decoding.plain import Plain
from cognica_mlx.decoding.quantized_prefix import QuantizedPrefix
from cognica_mlx.decoding.requests import (
    DecodedToken,
    Read,
    Request,
    Score,
    Steps,
    as_row,
    through,
    top_of,
)
from cognica_mlx.decoding.sampling import Sampler, Scores, logprob_of
from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.decoding.targets import Target
from cognica_mlx.errors import RequestError

MAX_DRAFTS = 64


class Speculative:
    """Draft up to `num_draft_tokens` a round with one of `drafters`, verify with `target`.

    With `looks_up` also draft what followed the same tokens earlier in the text.
    """

    def __init__(
        self,
        target: Target,
        drafters: Sequence[StageDrafter],
        num_draft_tokens: int = 3,
        looks_up: bool = False,
    ):
        least = 0 if looks_up else 1
        if not least <= num_draft_tokens <= MAX_DRAFTS:
            raise RequestError(
                f"num_draft_tokens {num_draft_tokens} is not between {least} and {MAX_DRAFTS}"
            )
        self.target, self.looks_up = target, looks_up
        self.drafters = tuple(drafters) if num_draft_tokens else ()
        self.num_draft_tokens = num_draft_tokens
        self.depth = self.prefill_stage = target.depth
        self.draft_stage = drafters[-1].target.depth
        self._plain = Plain(target)

    @property
    def prefix(self) -> QuantizedPrefix | None:
        """The quantized copy that it drafts with, if any."""
        return next((drafter.prefix for drafter in self.drafters if drafter.prefix), None)

    @property
    def most(self) -> int:
        """The most drafts of a round."""
        return self.num_draft_tokens + (MOST if self.looks_up else 0)

    def steps(self, sequence: DecodingSequence) -> Steps:
        state = sequence.state
        lookup = Lookup(sequence.text, sequence.special) if self.looks_up else None
        ahead: Draft | None = None
        plan = Plan()
        while sequence.budget:
            yield from sequence.forced()
            if not sequence.budget:
                return
            if not ahead:
                plan = self._plan(sequence, lookup)
            if not plan:
                yield from self._plain.steps(sequence, lambda: bool(self._plan(sequence, lookup)))
                continue
            state.append(sequence.text[state.length : -1])
            room = sequence.budget - 1  # the full model adds a token of its own
            if ahead:
                draft = ahead
            else:
                draft = begin(sequence, lookup.offer(plan.looked_up) if lookup else ())
                if plan.count:
                    count = min(plan.count, room - len(draft))
                    yield from self.drafters[plan.drafter].draft(sequence, draft, count, room)
            sequence.drafts.update(maker for maker in draft.makers if maker != FORCED)
            ahead = yield from self._verify(sequence, plan, draft)

    def _plan(self, sequence: DecodingSequence, lookup: Lookup | None) -> Plan:
        advice, room = sequence.advice, sequence.budget - 1
        offered = agreeing = 0
        if lookup:
            for length, hit in lookup.update():
                advice.observed(length, hit)
            agreeing = lookup.length
            offered = len(lookup.offer(min(MOST, room)))
        most = min(self.num_draft_tokens, room)
        return advice.plan(offered, agreeing, most, self._drafts_meanwhile(sequence))

    def _drafts_meanwhile(self, sequence: DecodingSequence) -> bool:
        """Whether other machines verify, and the full model's token after a draft can be guessed,
        so that this machine can go on drafting meanwhile."""
        behind = sequence.model.stages[self.draft_stage + 1 : self.depth + 1]
        guessed = sequence.sampler.greedy and not sequence.constraint
        return guessed and any(stage.rank for stage in behind)

    def _verify(
        self, sequence: DecodingSequence, plan: Plan, draft: Draft
    ) -> Generator[Request | DecodedToken, Any, Draft | None]:
        """Verify a draft, roll back rejected tokens, and emit the accepted ones and one token of
        the full model's own.

        Returns the draft of the next round if it was made meanwhile and can be used."""
        state, sampler, constraint = sequence.state, sequence.sampler, sequence.constraint
        rows = len(draft) + 1
        # One row more than drafts: the same pass predicts the token after the last draft.
        tokens = [as_row(sequence.text[-1]), *draft.tokens]
        for token in tokens[state.length - draft.first :]:
            state.append(token)
        yield from through(state, self.depth)
        end, drafted = state.length, draft.joined()
        ahead = None
        drafter = self.drafters[plan.drafter] if plan.count else None
        if drafter and drafter.goes_on and self._drafts_meanwhile(sequence):
            ahead = yield from drafter.go_on(sequence, draft, plan.count)
            if ahead:
                sequence.advice.drafted_meanwhile(plan.drafter, rows, len(ahead))
        scores = yield Score(state, self.target, rows, end)
        context = sampler.extend(draft.context, drafted)
        scores = sampler.process(scores, context, _masks(draft, constraint))
        agree, chosen = judge(sampler, scores, drafted, draft)
        kept = mx.cumprod(agree.astype(mx.int32)).sum() if len(draft) else mx.array(0)
        logprobs = logprob_of(scores.array, chosen)
        drafted_logprobs = logprob_of(scores.array, mx.concatenate([drafted, chosen[-1:]]))
        arrays = kept, chosen, logprobs, drafted, drafted_logprobs, *sampler.alternatives(scores)
        accepted, chosen, logprobs, drafted, drafted_logprobs, *best = yield Read(
            state, arrays, sampler.carried()
        )
        _tell(sequence.advice, draft.makers, accepted)
        used = False
        if ahead and ahead.before is not None and accepted == len(draft):
            (((guess,),),) = yield Read(state, (ahead.before,))
            used = guess == chosen[accepted]
        if not used:
            state.rollback(draft.first + 1 + accepted)
        chooses = True
        if constraint:
            constraint.rollback(len(draft) - accepted)
            # The full model's token is dropped if the constraint forces the next one or has ended.
            chooses = not (constraint.ended or constraint.forced())
            if chooses:
                constraint.commit([chosen[accepted]])
        yield from self._emitted(draft, drafted[:accepted], drafted_logprobs[:accepted], best)
        if chooses:
            top = top_of(best, accepted)
            yield DecodedToken(chosen[accepted], logprobs[accepted], self.depth, top=top)
        return ahead if used else None

    def _emitted(
        self, draft: Draft, tokens: Sequence[int], logprobs: Sequence[float], best: Sequence[Any]
    ) -> Iterator[DecodedToken]:
        """Emit the first `len(tokens)` drafts."""
        numbers = zip(tokens, logprobs, draft.makers, strict=False)
        for row, (token, logprob, maker) in enumerate(numbers):
            if maker == FORCED:
                yield DecodedToken(token, 0.0, 0, forced=True)
                continue
            # A looked-up token was proposed by no stage: credit the full model.
            stage = self.depth if maker == LOOKED_UP else self.draft_stage
            yield DecodedToken(token, logprob, stage, drafter=maker, top=top_of(best, row))


def _tell(advice: Advice, makers: Sequence[str], accepted: int) -> None:
    """Report each drafter's acceptance, given that the first `accepted` tokens were accepted.
    Tokens after another drafter's rejected token were not judged."""
    for maker in dict.fromkeys(makers):
        if maker not in (LOOKED_UP, FORCED) and makers.index(maker) <= accepted:
            advice.judged(maker, makers[:accepted].count(maker), makers.count(maker))


def _masks(draft: Draft, constraint: Constraint | None) -> mx.array | None:
    """The masks at each draft's position and after the last, (n + 1, W)."""
    if constraint is None:
        return None
    # After the end the mask is not used.
    last = draft.masks[-1] if constraint.ended else constraint.mask()[None]
    return mx.concatenate([*draft.masks, last])


def judge(
    sampler: Sampler, scores: Scores, drafted: mx.array, draft: Draft
) -> tuple[mx.array, mx.array]:
    """Which drafts (n,) the full model's scores (n + 1, V) accept, and for every row (n + 1,) the
    token to emit if it is the first rejected one (in the last row, if none is)."""
    if sampler.greedy:
        return scores.best[:-1] == drafted, scores.best
    p = sampler.log_probs(scores)
    if not len(draft):
        return mx.zeros((0,), mx.bool_), sampler.draw(p)
    q = mx.concatenate(draft.log_probs)
    picked = drafted[:, None]
    ratio = mx.take_along_axis(p[:-1], picked, axis=-1) - mx.take_along_axis(q, picked, axis=-1)
    agree = mx.log(sampler.uniform(len(draft))) < ratio[:, 0]
    residual = mx.log(mx.maximum(mx.exp(p[:-1]) - mx.exp(q), 0))
    return agree, sampler.draw(mx.concatenate([residual, p[-1:]]))
