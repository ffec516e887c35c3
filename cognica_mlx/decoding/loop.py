"""The one decoding loop: prefill, then whatever the policy emits.

A policy decides how deep each token goes; the loop owns the prompt, the token limit and the
promise that afterwards the state holds the prompt and what was emitted, nothing else.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from cognica_mlx.errors import RequestError, RollbackError
from cognica_mlx.model import Hidden, PoEModel
from cognica_mlx.state import DecodingState, Progress


@dataclass(frozen=True)
class DecodedToken:
    """One token: its id, its log-probability under the scores that chose or confirmed it (after
    the repetition penalty, before temperature and filters), the stage that emitted it, and
    whether it was drafted."""

    token: int
    logprob: float
    stage: int
    from_draft: bool = False

    @staticmethod
    def read(
        token: mx.array, logprob: mx.array, stage: int, from_draft: bool = False
    ) -> DecodedToken:
        """From one-element arrays; waits for them."""
        return DecodedToken(int(number(token)), number(logprob), stage, from_draft)


class Policy(Protocol):
    """How a mode decodes.

    `depth` is the deepest stage it may need, `prefill_stage` the stage that a prompt must have been
    run through before the first token, `drafted` how many drafts it has made so far.
    """

    depth: int
    prefill_stage: int
    drafted: int

    def run(self, state: DecodingState, token: int, budget: int) -> Iterator[DecodedToken]:
        """Emit up to `budget` tokens after `token`, which the state does not hold yet."""
        ...


def decode(
    model: PoEModel,
    prompt: Sequence[int],
    policy: Policy,
    *,
    max_tokens: int,
    state: DecodingState | None = None,
    prefill_step_size: int | None = None,
    progress: Progress | None = None,
) -> Generator[DecodedToken, None, None]:
    """Decode up to `max_tokens` tokens after the token ids `prompt`.

    A `state` that already holds a beginning of the prompt is continued: only the rest is run.
    Afterwards it holds the prompt and the tokens taken from this iterator, the last of them
    possibly left out, as nothing has been predicted from it yet.

    Raises RequestError for an empty prompt, a token id outside the vocabulary, or a state of
    another model.
    """
    if not prompt:
        raise RequestError("the prompt is empty; give at least one token")
    if max_tokens < 1:
        raise RequestError(f"max_tokens {max_tokens} must be at least 1")
    if prefill_step_size is not None and prefill_step_size < 1:
        raise RequestError(f"prefill_step_size {prefill_step_size} must be at least 1")
    state = state or DecodingState(model)
    if state.model is not model:
        raise RequestError("the decoding state belongs to another model")
    state.check_ids(prompt)
    _return_to_common_start(state, prompt)
    state.set_depth(policy.depth, progress)
    state.prefill(
        prompt[state.length : -1],
        policy.prefill_stage,
        step_size=prefill_step_size,
        progress=progress,
    )
    emitted = 0
    try:
        for decoded in policy.run(state, prompt[-1], max_tokens):
            emitted += 1
            yield decoded
            if emitted == max_tokens:
                return
    finally:
        state.rollback(min(state.length, len(prompt) + emitted))


def _return_to_common_start(state: DecodingState, prompt: Sequence[int]) -> None:
    """Roll back to what the state and the prompt, its last token left out, have in common."""
    held, wanted = state.tokens, list(prompt[:-1])
    common = min(len(held), len(wanted))
    if held[:common] != wanted[:common]:  # most often it goes on where it was
        common = next(
            i for i, pair in enumerate(zip(held, wanted, strict=False)) if len({*pair}) > 1
        )
    try:
        state.rollback(common)
    except RollbackError:
        state.rollback(0)


def advance_through(state: DecodingState, depth: int) -> dict[int, Hidden]:
    """Advance every stage up to `depth`; each boundary's last position, (1, 1, D).

    A stage that has already caught up by itself has nothing to run, and its activations are there.
    """
    for stage in range(depth + 1):
        state.advance(stage)
    end = state.length
    return {stage: state.boundary(stage, end - 1, end) for stage in range(depth + 1)}


def number(array: mx.array) -> float:
    """The value of a one-element array; waits for it."""
    value = array.item()
    assert not isinstance(value, complex)
    return value


def as_row(token: mx.array | int) -> mx.array:
    """One token id as the (1, 1) int32 array that a state appends."""
    return mx.array(token, dtype=mx.int32).reshape(1, 1)
