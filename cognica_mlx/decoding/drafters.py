"""Where drafts come from: the model's first stages, a quantized copy of them, the text itself.

A round's draft starts with looked-up tokens, if any; a stage drafter continues after them. If
drafts are rejected, only the state's positions need to be rolled back.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from cognica_mlx.decoding.choosing import DRAFT, Context, certain, extended
from cognica_mlx.decoding.constraint import Constraint
from cognica_mlx.decoding.quantized_prefix import QuantizedPrefix
from cognica_mlx.decoding.requests import Read, Request, Score, as_row, through
from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.decoding.targets import Target
from cognica_mlx.errors import RequestError

# The drafters' names, as in tokens and statistics.
OWN, ROUNDED, LOOKED_UP, FORCED = "stages", "rounded", "lookup", "forced"


@dataclass
class Draft:
    """Drafted tokens, unevaluated: each list but `contexts` has one entry per token.

    tokens (1, 1) int32; makers, the drafter of each (`FORCED` if a constraint allowed no other
    token); q (1, V), the distribution that each was drawn from, empty when greedy. Under a
    constraint, `masks` holds the mask at each draft's place, (1, W). `contexts` are the penalties'
    contexts at each draft's place and behind the last. `first` is the position of the token before
    the drafts, `before` that token itself if it is only a guess, (1, 1) int32.
    """

    first: int
    contexts: list[Context]
    tokens: list[mx.array] = field(default_factory=list)
    makers: list[str] = field(default_factory=list)
    q: list[mx.array] = field(default_factory=list)
    masks: list[mx.array] = field(default_factory=list)
    before: mx.array | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, maker: str, token: mx.array, context: Context | None = None) -> None:
        """Add a token; `context` is the one behind it, if that is known already."""
        self.tokens.append(token)
        self.makers.append(maker)
        self.contexts.append(extended(self.contexts[-1], token) if context is None else context)

    def add_certain(self, maker: str, token: int, sequence: DecodingSequence) -> mx.array:
        """Add a token that was not drawn at random: q is 1. Returns it as an array."""
        row = as_row(token)
        self.add(maker, row)
        if not sequence.sampler.greedy:
            self.q.append(certain(token, sequence.model.config.vocab_size))
        return row


def begin(sequence: DecodingSequence, looked_up: Sequence[int]) -> Draft:
    """A draft of `looked_up` tokens, up to the first that the sequence's constraint forbids."""
    draft, constraint = Draft(sequence.state.length, [sequence.context()]), sequence.constraint
    for token in looked_up:
        if constraint:
            if constraint.ended:
                break
            mask = constraint.mask()
            if not int(mask[token // 32].item()) >> token % 32 & 1:  # type: ignore[arg-type]
                break
            draft.masks.append(mask[None])
            constraint.commit([token])
        draft.add_certain(LOOKED_UP, token, sequence)
    return draft


class StageDrafter:
    """Drafts with the model's own first stages, up to the one that `target` reads; or with `prefix`
    a quantized copy of them, which runs in a scratch state and leaves the state unchanged.

    The host waits for each draft under a constraint, which needs it for the next mask; otherwise it
    waits for none.
    """

    def __init__(self, target: Target, prefix: QuantizedPrefix | None = None):
        self.target, self.prefix = target, prefix
        self.name = ROUNDED if prefix else OWN
        # Whether it can draft behind drafts that are not verified yet.
        self.goes_on = prefix is None

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
        room = min(room, state.slack)
        # Not in the state yet.
        tokens = [as_row(sequence.text[-1]), *draft.tokens]
        for _ in range(count):
            if len(draft) >= room or (constraint and constraint.ended):
                break
            for token in tokens:
                state.append(token)
            tokens = []
            yield from through(state, self.target.depth)
            masks, context = sequence.mask(), draft.contexts[-1]
            choice = sampler.choice(DRAFT, state.length, context, masks)
            chosen = yield Score(state, self.target, choice=choice)
            token = chosen["token"]
            draft.add(self.name, token, {name: chosen[name] for name in context})
            if "q" in chosen:
                draft.q.append(chosen["q"])
            tokens.append(token)
            if constraint and masks is not None:
                draft.masks.append(masks)
                (((known,),),) = yield Read(sequence.state, (token,))
                constraint.commit([known])
                tokens += _forced(draft, sequence, constraint, room)

    def go_on(
        self, sequence: DecodingSequence, earlier: Draft, count: int
    ) -> Generator[Request, Any, Draft | None]:
        """Draft after a draft that is being verified, all of it already in the state: first a guess
        of the full model's next token, then up to `count` tokens. Appends and runs them, and starts
        computing them. Greedy and without a constraint only; None if there is no room."""
        state, sampler = sequence.state, sequence.sampler
        # The budget left if all is kept, less one for the guess.
        room = sequence.budget - len(earlier) - 1
        count = min(count, room - 1, state.slack - len(earlier) - 2)
        if count < 1:
            return None
        draft, context = Draft(state.length, []), earlier.contexts[-1]
        for number in range(count + 1):
            choice = sampler.choice(DRAFT, state.length, context)
            chosen = yield Score(state, self.target, choice=choice)
            token, context = chosen["token"], {name: chosen[name] for name in context}
            if number:
                draft.add(self.name, token, context)
            else:
                draft.before, draft.contexts = token, [context]
            state.append(token)
            yield from through(state, self.target.depth)
        last = state.boundary(self.target.depth, state.length - 1, state.length)
        contexts = [array for context in draft.contexts for array in context.values()]
        yield Read(state, (), (*draft.tokens, *last.arrays(), *contexts))
        return draft


def _forced(
    draft: Draft, sequence: DecodingSequence, constraint: Constraint, room: int
) -> list[mx.array]:
    """Add the tokens that the constraint forces after a draft, up to `room` tokens in all; returns
    them."""
    tokens: list[mx.array] = []
    while len(draft) < room and (forced := constraint.forced()):
        for known in forced[: room - len(draft)]:
            draft.masks.append(constraint.mask()[None])
            constraint.commit([known])
            tokens.append(draft.add_certain(FORCED, known, sequence))
    return tokens
