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

from collections.abc import Generator, Sequence
from typing import Any

import mlx.core as mx

from cognica_mlx.decoding.advice import Advice, Plan
from cognica_mlx.decoding.choosing import VERDICT, Choice
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
    reported,
    through,
    top_of,
)
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
        state, constraint = sequence.state, sequence.constraint
        rows = len(draft) + 1
        # One row more than drafts: the same pass predicts the token after the last draft.
        tokens = [as_row(sequence.text[-1]), *draft.tokens]
        for token in tokens[state.length - draft.first :]:
            state.append(token)
        yield from through(state, self.depth)
        end, ahead = state.length, None
        drafter = self.drafters[plan.drafter] if plan.count else None
        if drafter and drafter.goes_on and self._drafts_meanwhile(sequence):
            ahead = yield from drafter.go_on(sequence, draft, plan.count)
            if ahead:
                sequence.advice.drafted_meanwhile(plan.drafter, rows, len(ahead))
        chosen = yield Score(state, self.target, rows, end, _choice(sequence, draft))
        arrays = chosen["accepted"], *reported(chosen)
        verdicts, tokens, logprobs, *best = yield Read(state, arrays)
        emitted = [
            (token, logprob, top_of(best, row))
            for row, ((token,), (logprob,)) in enumerate(zip(tokens, logprobs, strict=True))
        ]
        accepted = verdicts.index([False])
        own = emitted[accepted][0]
        _tell(sequence.advice, draft.makers, accepted)
        used = False
        if ahead and ahead.before is not None and accepted == len(draft):
            (((guess,),),) = yield Read(state, (ahead.before,))
            used = guess == own
        if not used:
            state.rollback(draft.first + 1 + accepted)
        chooses = True
        if constraint:
            constraint.rollback(len(draft) - accepted)
            # The full model's token is dropped if the constraint forces the next one or has ended.
            chooses = not (constraint.ended or constraint.forced())
            if chooses:
                constraint.commit([own])
        for maker, (token, logprob, top) in zip(draft.makers, emitted[:accepted], strict=False):
            if maker == FORCED:
                yield DecodedToken(token, 0.0, 0, forced=True)
                continue
            # A looked-up token was proposed by no stage: credit the full model.
            stage = self.depth if maker == LOOKED_UP else self.draft_stage
            yield DecodedToken(token, logprob, stage, drafter=maker, top=top)
        if chooses:
            token, logprob, top = emitted[accepted]
            yield DecodedToken(token, logprob, self.depth, top=top)
        return ahead if used else None


def _tell(advice: Advice, makers: Sequence[str], accepted: int) -> None:
    """Report each drafter's acceptance, given that the first `accepted` tokens were accepted.
    Tokens after another drafter's rejected token were not judged."""
    for maker in dict.fromkeys(makers):
        if maker not in (LOOKED_UP, FORCED) and makers.index(maker) <= accepted:
            advice.judged(maker, makers[:accepted].count(maker), makers.count(maker))


def _choice(sequence: DecodingSequence, draft: Draft) -> Choice:
    """How the full model judges a draft and chooses what follows it: a row for each place."""
    # The last row has no draft to judge.
    drafts = {"drafted": mx.concatenate([*draft.tokens, as_row(-1)])}
    if not sequence.sampler.greedy:
        nothing = mx.zeros((1, sequence.model.config.vocab_size))
        drafts["q"] = mx.concatenate([*draft.q, nothing])
    context = {
        name: mx.concatenate([context[name] for context in draft.contexts])
        for name in draft.contexts[0]
    }
    masks, constraint = None, sequence.constraint
    if constraint:
        # After the end the mask is not used.
        last = draft.masks[-1] if constraint.ended else constraint.mask()[None]
        masks = mx.concatenate([*draft.masks, last])
    rows = len(draft) + 1
    return sequence.sampler.choice(VERDICT, draft.first + 1, context, masks, drafts, rows)
