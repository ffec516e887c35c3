"""Self-speculation: the first stages draft, the full model verifies the drafts in one pass.

The drafter is the model's own prefix, so its keys, values and activations are the real ones: a
round runs the drafted positions through the draft stages once, through the others once, and rolls
back what was refused. Greedy output is the full model's. With a temperature a draft x is kept
with probability min(1, p(x) / q(x)) and a refused one replaced by a draw from max(p - q, 0)
(Leviathan et al. 2023, Chen et al. 2023), so the output has the full model's distribution; p and
q pass through the same penalties and filters.

Certified speculation skips verifications. A draft whose margin clears the WAND bounds that remain
after the draft stage is certified: the deeper stages would hardly overturn it. A block of certified
drafts is emitted at once, and its positions stay pending in the deeper stages. A block with an
uncertified draft is verified as a whole, together with all that is pending; its certified drafts
count as accepted. The output agrees with the full model's as often as WAND's does; with a
temperature, certified drafts are drawn from the draft stage's distribution and the others follow
the full model's.

The host waits once for a verification, and once for a block of drafts that may be certified.

Where other machines verify, this one goes on drafting (Butler et al. 2024, PipeInfer): it guesses
the full model's token after the block and drafts the next block behind that. A refusal, or another
token than was guessed, takes all of it back.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import mlx.core as mx

from cognica_mlx.constraint import Constraint
from cognica_mlx.decoding.drafters import Draft, OwnStages
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
from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.decoding.targets import Target
from cognica_mlx.errors import RequestError
from cognica_mlx.sampling import Sampler, Scores, logprob_of

MAX_DRAFTS = 64


class Speculative:
    """Draft with `drafter`, verify with `target`, `num_draft_tokens` at most in a round.

    With `certain` drafts that lead by more than that are not verified for their own sake.
    """

    def __init__(
        self,
        target: Target,
        drafter: OwnStages,
        num_draft_tokens: int = 3,
        certain: float | None = None,
    ):
        if not 1 <= num_draft_tokens <= MAX_DRAFTS:
            raise RequestError(
                f"num_draft_tokens {num_draft_tokens} is not between 1 and {MAX_DRAFTS}"
            )
        if drafter.stop_below is not None and not drafter.stop_below >= 0:
            raise RequestError(f"draft_margin {drafter.stop_below} is below 0")
        self.target, self.drafter = target, drafter
        self.num_draft_tokens, self.certain = num_draft_tokens, certain
        self.depth = target.depth
        self.draft_stage = drafter.target.depth
        self.prefill_stage = target.depth if certain is None else self.draft_stage

    def steps(self, sequence: DecodingSequence) -> Steps:
        """Emit tokens, a round at a time."""
        state = sequence.state
        ahead: Draft | None = None
        while sequence.budget and sequence.advice.pays():
            yield from sequence.certain()
            if not sequence.budget:
                return
            state.append(sequence.text[state.length : -1])
            most = self.num_draft_tokens
            if self.drafter.stop_below is None and self.certain is None:
                most = sequence.advice.draft_length(most)
            # A verification adds a token of its own; certified drafts may have to do without.
            room = sequence.budget - (self.certain is None)
            draft = ahead or (yield from self.drafter.draft(sequence, min(most, room), room))
            sequence.drafted += draft.forced.count(False)
            certified: list[bool] = []
            if self.certain is not None:
                arrays = tuple(mx.concatenate(part) for part in _read(draft))
                numbers: list = (yield Read(state, arrays)) if arrays else []
                certified = [lead > self.certain for lead in numbers[2]] if arrays else []
                if all(certified) and not draft.stopped:
                    tokens, logprobs, _, *best = numbers
                    yield from self._emitted(draft, tokens, logprobs, best)
                    continue
            ahead = yield from self._verify(sequence, draft, certified)

    def _goes_on(self, sequence: DecodingSequence) -> bool:
        """Whether to draft while a draft is being verified: other machines do that, and the full
        model's own token after it can be guessed."""
        behind = sequence.state.stages[self.draft_stage + 1 : self.depth + 1]
        waits = sequence.constraint or self.drafter.stop_below is not None
        return (
            any(stage.rank for stage in behind)
            and self.certain is None
            and sequence.sampler.greedy
            and not waits
        )

    def _verify(
        self, sequence: DecodingSequence, draft: Draft, certified: list[bool]
    ) -> Generator[Request | DecodedToken, Any, Draft | None]:
        """Verify a draft, roll back what is refused, and emit what is kept and one token of the
        full model's own. Drafts that are `certified` are kept whatever the full model says.

        Returns what has been drafted meanwhile, if all that it builds on is kept."""
        state, sampler, constraint = sequence.state, sequence.sampler, sequence.constraint
        rows = len(draft) + 1
        if state.length < draft.first + rows:
            # What the full model predicts after the last draft comes with the same pass.
            state.append(draft.tokens[-1] if len(draft) else as_row(sequence.text[-1]))
        yield from through(state, self.depth)
        end, drafted = state.length, draft.joined()
        ahead = None
        if self._goes_on(sequence):
            ahead = yield from self.drafter.go_on(sequence, draft, self.num_draft_tokens)
        scores = yield Score(state, self.target, rows, end)
        context = sampler.extend(draft.context, drafted)
        scores = sampler.process(scores, context, _masks(draft, constraint))
        agree, chosen = judge(sampler, scores, drafted, draft)
        if certified:
            agree = agree | mx.array(certified, dtype=mx.bool_)
        kept = mx.cumprod(agree.astype(mx.int32)).sum() if len(draft) else mx.array(0)
        logprobs = logprob_of(scores.array, chosen)
        drafted_logprobs = logprob_of(scores.array, mx.concatenate([drafted, chosen[-1:]]))
        arrays = kept, chosen, logprobs, drafted, drafted_logprobs, *sampler.alternatives(scores)
        accepted, chosen, logprobs, drafted, drafted_logprobs, *best = yield Read(state, arrays)
        forced = draft.forced
        sequence.advice.judged(forced[:accepted].count(False), forced.count(False))
        if ahead and ahead.after is not None and accepted == len(draft):
            (((guess,),),) = yield Read(state, (ahead.after,))
            ahead = ahead if guess == chosen[accepted] else None
        else:
            ahead = None
        if ahead is None:
            state.rollback(draft.first + 1 + accepted)
        chooses = True
        if constraint:
            constraint.rollback(len(draft) - accepted)
            # Where there is no choice, or nothing can follow, the full model was asked in vain.
            chooses = not (constraint.ended or constraint.forced())
            if chooses:
                constraint.commit([chosen[accepted]])
        yield from self._emitted(draft, drafted[:accepted], drafted_logprobs[:accepted], best)
        if chooses:
            top = top_of(best, accepted)
            yield DecodedToken(chosen[accepted], logprobs[accepted], self.depth, top=top)
        return ahead

    def _emitted(
        self, draft: Draft, tokens: Sequence[int], logprobs: Sequence[float], best: Sequence
    ) -> Iterator[DecodedToken]:
        """The first of the drafts, as many as there are `tokens`."""
        numbers = zip(tokens, logprobs, draft.forced, strict=False)
        for row, (token, logprob, forced) in enumerate(numbers):
            if forced:
                yield DecodedToken(token, 0.0, 0, forced=True)
            else:
                top = top_of(best, row)
                yield DecodedToken(token, logprob, self.draft_stage, from_draft=True, top=top)


def _masks(draft: Draft, constraint: Constraint | None) -> mx.array | None:
    """What is allowed at each draft's place and after the last: (n + 1, W)."""
    if constraint is None:
        return None
    # After the end nothing is asked for: anything may stand there.
    last = draft.masks[-1] if constraint.ended else constraint.mask()[None]
    return mx.concatenate([*draft.masks, last])


def _read(draft: Draft) -> tuple[list[mx.array], ...]:
    """What a certified block reads: tokens, log-probabilities, margins, perhaps alternatives;
    nothing without drafts."""
    if not draft.tokens:
        return ()
    tokens = [token.reshape(-1) for token in draft.tokens]
    return tokens, draft.logprobs, draft.margins, *map(list, zip(*draft.alternatives, strict=True))


def judge(
    sampler: Sampler, scores: Scores, drafted: mx.array, draft: Draft
) -> tuple[mx.array, mx.array]:
    """Which drafts (n,) the full model's scores (n + 1, V) keep, and for every row the token
    (n + 1,) that follows if it is the first refused (or, in the last row, if none is)."""
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
