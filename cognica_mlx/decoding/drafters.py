"""Where drafts come from: the model's own first stages.

A drafter appends the tokens that it drafts and runs them through the stages it uses. What a refusal
takes back is the state's own `rollback`.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from cognica_mlx.constraint import Constraint
from cognica_mlx.decoding.requests import Read, Request, Score, as_row, through
from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.decoding.targets import Target
from cognica_mlx.errors import RequestError
from cognica_mlx.sampling import Context, Scores, logprob_of, masked


@dataclass
class Draft:
    """Drafted tokens, unevaluated: each list holds one entry a token.

    tokens (1, 1) int; log_probs (1, V), what each was drawn from, empty when greedy; logprobs (1,)
    of the tokens; margins (1,) by which the draft's best score led; alternatives, what the sampler
    reports. `first` is the position of the token before them, `context` what the penalties looked
    back on at that position; `stopped` says that the next draft was too weak to be one. Under a
    constraint `masks` has what it allowed at each draft's place, (1, W), and `forced` whether that
    was this token alone. `after` is the token before them where that is a guess, (1, 1) int.
    """

    first: int
    context: Context | None
    tokens: list[mx.array] = field(default_factory=list)
    log_probs: list[mx.array] = field(default_factory=list)
    logprobs: list[mx.array] = field(default_factory=list)
    margins: list[mx.array] = field(default_factory=list)
    alternatives: list[tuple[mx.array, ...]] = field(default_factory=list)
    masks: list[mx.array] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    stopped: bool = False
    after: mx.array | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def add(
        self,
        token: mx.array,
        logprob: mx.array,
        margin: mx.array,
        alternatives: tuple[mx.array, ...],
        forced: bool = False,
    ) -> None:
        """Add one more token."""
        self.tokens.append(token)
        self.alternatives.append(alternatives)
        self.logprobs.append(logprob)
        self.margins.append(margin)
        self.forced.append(forced)

    def joined(self) -> mx.array:
        """The drafted tokens, (n,) int32."""
        empty = mx.zeros((0,), mx.int32)
        return mx.concatenate([t.reshape(-1) for t in self.tokens]) if self.tokens else empty


class OwnStages:
    """The model's own stages, up to the one that `target` reads.

    With `stop_below` drafting stops where the two best scores are closer than that, and that draft
    is not used: then the host waits for each draft, otherwise for none. It also waits for each
    under a constraint, which decides by one token what the next may be.
    """

    def __init__(self, target: Target, stop_below: float | None):
        self.target, self.stop_below = target, stop_below

    def draft(
        self, sequence: DecodingSequence, count: int, room: int
    ) -> Generator[Request, Any, Draft]:
        """Draft up to `count` tokens after the sequence's text, the last token of which the state
        does not hold. Appends it and the drafts but the last.

        What a constraint forces between the drafts comes on top, up to `room` tokens in all.
        """
        state, sampler, constraint = sequence.state, sequence.sampler, sequence.constraint
        if count > state.slack:
            raise RequestError(
                f"num_draft_tokens {count} is more than the {state.slack} positions that this "
                "state can roll back"
            )
        draft = Draft(state.length, sequence.context())
        context, room = draft.context, min(room, state.slack)
        # Not in the state yet.
        tokens = [as_row(sequence.text[-1])]
        for _ in range(count):
            if len(draft) == room or (constraint and constraint.ended):
                break
            for token in tokens:
                state.append(token)
            tokens = []
            yield from through(state, self.target.depth)
            masks = sequence.mask()
            scores = sampler.process((yield Score(state, self.target)), context, masks)
            lead = scores.margins
            if self.stop_below is not None:
                ((number,),) = yield Read(state, (lead,))
                if number < self.stop_below:
                    draft.stopped = True
                    break
            if sampler.greedy:
                chosen, logprob = sampler.choose(scores)
            else:
                draft.log_probs.append(sampler.log_probs(scores))
                chosen = sampler.draw(draft.log_probs[-1])
                logprob = logprob_of(scores.array, chosen)
            token = as_row(chosen)
            draft.add(token, logprob, lead, sampler.alternatives(scores))
            tokens.append(token)
            if constraint and masks is not None:
                draft.masks.append(masks)
                (((known,),),) = yield Read(state, (token,))
                constraint.commit([known])
                tokens += _certain(draft, sequence, constraint, room)
            for token in tokens:
                context = sampler.extend(context, token)
        for token in tokens[:-1]:
            state.append(token)
        return draft

    def go_on(
        self, sequence: DecodingSequence, before: Draft, count: int
    ) -> Generator[Request, Any, Draft | None]:
        """Draft behind a draft that is being verified, all of which the state holds: first what
        the full model may say after it, then up to `count` tokens. Appends all, runs them and
        starts computing them. Greedy, and without a constraint; None where there is no room."""
        state, sampler = sequence.state, sequence.sampler
        # What follows if all is kept, of which one is the guess.
        room = sequence.budget - len(before) - 1
        count = min(count, room - 1, state.slack - len(before) - 2)
        if count < 1:
            return None
        context = sampler.extend(before.context, before.joined())
        draft = Draft(state.length, None)
        for number in range(count + 1):
            scores = sampler.process((yield Score(state, self.target)), context)
            chosen, logprob = sampler.choose(scores)
            token = as_row(chosen)
            context = sampler.extend(context, token)
            if number:
                draft.add(token, logprob, scores.margins, sampler.alternatives(scores))
            else:
                draft.after, draft.context = token, context
            state.append(token)
            yield from through(state, self.target.depth)
        last = state.boundary(self.target.depth, state.length - 1, state.length)
        yield Read(state, (), (*draft.tokens, *last.arrays()))
        return draft


def _certain(
    draft: Draft, sequence: DecodingSequence, constraint: Constraint, room: int
) -> list[mx.array]:
    """Add to a draft what the constraint forces after it, `room` tokens in all; those tokens."""
    sampler, tokens = sequence.sampler, []
    while len(draft) < room and (forced := constraint.forced()):
        for known in forced[: room - len(draft)]:
            masks = constraint.mask()[None]
            constraint.commit([known])
            draft.masks.append(masks)
            nothing = mx.zeros((1, sequence.model.config.vocab_size))
            scores = Scores(masked(nothing, masks))
            if not sampler.greedy:
                draft.log_probs.append(sampler.log_probs(scores))
            tokens.append(as_row(known))
            alternatives = sampler.alternatives(scores)
            draft.add(tokens[-1], mx.zeros((1,)), mx.full((1,), mx.inf), alternatives, forced=True)
    return tokens
