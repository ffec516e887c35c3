"""Where drafts come from: the model's first stages, a rounded copy of them, the text itself.

A round's draft starts with looked-up tokens, if any; a stage drafter continues after them. If
drafts are rejected, only the state's positions need to be rolled back.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from cognica_mlx.decoding.constraint import Constraint
from cognica_mlx.decoding.requests import Read, Request, Score, as_row, through
from cognica_mlx.decoding.rounded_prefix import RoundedPrefix
from cognica_mlx.decoding.sampling import Context, Scores, logprob_of, masked
from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.decoding.targets import Target
from cognica_mlx.errors import RequestError

# The drafters' names, as in tokens and statistics.
OWN, ROUNDED, LOOKED_UP, FORCED = "stages", "rounded", "lookup", "forced"


@dataclass
class Draft:
    """Drafted tokens, unevaluated: each list has one entry per token.

    tokens (1, 1) int; makers, the drafter of each (`FORCED` if a constraint allowed no other
    token); log_probs (1, V), the distribution that each was drawn from, empty when greedy. `first`
    is the position of the token before the drafts, `context` the penalties' context there;
    `stopped` means that the next draft was too weak to use. Under a constraint, `masks` holds the
    mask at each draft's place, (1, W). `after` is the token before the drafts if it is a guess,
    (1, 1) int.

    For drafts that were not looked up: logprobs (1,); margins (1,) by which the draft's best score
    led; alternatives, as the sampler reports them.
    """

    first: int
    context: Context | None
    tokens: list[mx.array] = field(default_factory=list)
    makers: list[str] = field(default_factory=list)
    log_probs: list[mx.array] = field(default_factory=list)
    logprobs: list[mx.array] = field(default_factory=list)
    margins: list[mx.array] = field(default_factory=list)
    alternatives: list[tuple[mx.array, ...]] = field(default_factory=list)
    masks: list[mx.array] = field(default_factory=list)
    stopped: bool = False
    after: mx.array | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def add(
        self,
        maker: str,
        token: mx.array,
        logprob: mx.array,
        margin: mx.array,
        alternatives: tuple[mx.array, ...],
    ) -> None:
        """Add a token."""
        self.tokens.append(token)
        self.makers.append(maker)
        self.alternatives.append(alternatives)
        self.logprobs.append(logprob)
        self.margins.append(margin)

    def joined(self) -> mx.array:
        """The drafted tokens, (n,) int32."""
        empty = mx.zeros((0,), mx.int32)
        return mx.concatenate([t.reshape(-1) for t in self.tokens]) if self.tokens else empty


def begin(sequence: DecodingSequence, looked_up: Sequence[int]) -> Draft:
    """A draft of `looked_up` tokens, up to the first that the sequence's constraint forbids. In
    rejection sampling their q is 1, because they were not drawn at random."""
    draft = Draft(sequence.state.length, sequence.context())
    constraint, size = sequence.constraint, sequence.model.config.vocab_size
    for token in looked_up:
        if constraint:
            if constraint.ended:
                break
            mask = constraint.mask()
            if not int(mask[token // 32].item()) >> token % 32 & 1:  # type: ignore[arg-type]
                break
            draft.masks.append(mask[None])
            constraint.commit([token])
        draft.tokens.append(as_row(token))
        draft.makers.append(LOOKED_UP)
        if not sequence.sampler.greedy:
            draft.log_probs.append(mx.where(mx.arange(size) == token, 0.0, -mx.inf)[None])
    return draft


class StageDrafter:
    """Drafts with the model's own first stages, up to the one that `target` reads; or with `prefix`
    a rounded copy of them, which runs in a scratch state and leaves the state unchanged.

    With `stop_below`, drafting stops at a draft whose two best scores are closer than that, and
    drops that draft. The host then waits for each draft. It also does so under a constraint, which
    needs each token for the next mask; otherwise it waits for none.
    """

    def __init__(
        self, target: Target, stop_below: float | None = None, prefix: RoundedPrefix | None = None
    ):
        self.target, self.stop_below, self.prefix = target, stop_below, prefix
        self.name = ROUNDED if prefix else OWN
        # Whether it can draft behind drafts that are not verified yet.
        self.goes_on = prefix is None and stop_below is None

    def draft(
        self, sequence: DecodingSequence, draft: Draft, count: int, room: int
    ) -> Generator[Request, Any, None]:
        """Add up to `count` tokens to a draft that follows the sequence's text, whose last token
        is not in the state yet.

        Tokens that a constraint forces between the drafts are extra, up to `room` tokens in all.
        """
        state, sampler, constraint = sequence.state, sequence.sampler, sequence.constraint
        if count > state.slack:
            raise RequestError(
                f"num_draft_tokens {count} is more than the {state.slack} positions that this "
                "state can roll back"
            )
        if self.prefix:
            yield from through(state, max(self.prefix.of))
            state = state.aside(self.prefix.stages, self.prefix.of)
        context, room = sampler.extend(draft.context, draft.joined()), min(room, state.slack)
        # Not in the state yet.
        tokens = [as_row(sequence.text[-1]), *draft.tokens]
        for _ in range(count):
            if len(draft) >= room or (constraint and constraint.ended):
                break
            for token in tokens:
                state.append(token)
            tokens = []
            yield from through(state, self.target.depth)
            masks = sequence.mask()
            scores = sampler.process((yield Score(state, self.target)), context, masks)
            lead = scores.margins
            if self.stop_below is not None:
                ((number,),) = yield Read(sequence.state, (lead,))
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
            draft.add(self.name, token, logprob, lead, sampler.alternatives(scores))
            tokens.append(token)
            if constraint and masks is not None:
                draft.masks.append(masks)
                (((known,),),) = yield Read(sequence.state, (token,))
                constraint.commit([known])
                tokens += _certain(draft, sequence, constraint, room)
            for token in tokens:
                context = sampler.extend(context, token)

    def go_on(
        self, sequence: DecodingSequence, before: Draft, count: int
    ) -> Generator[Request, Any, Draft | None]:
        """Draft after a draft that is being verified, all of it already in the state: first a guess
        of the full model's next token, then up to `count` tokens. Appends and runs them, and starts
        computing them. Greedy and without a constraint only; None if there is no room."""
        state, sampler = sequence.state, sequence.sampler
        # The budget left if all is kept, less one for the guess.
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
                best = sampler.alternatives(scores)
                draft.add(self.name, token, logprob, scores.margins, best)
            else:
                draft.after, draft.context = token, context
            state.append(token)
            yield from through(state, self.target.depth)
        last = state.boundary(self.target.depth, state.length - 1, state.length)
        yield Read(state, (), (*draft.tokens, *last.arrays(), *sampler.carried(draft.context)))
        return draft


def _certain(
    draft: Draft, sequence: DecodingSequence, constraint: Constraint, room: int
) -> list[mx.array]:
    """Add the tokens that the constraint forces after a draft, up to `room` tokens in all; returns
    them."""
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
            draft.add(FORCED, tokens[-1], mx.zeros((1,)), mx.full((1,), mx.inf), alternatives)
    return tokens
