"""Requests that a decoding mode makes of its driver.

A mode is a generator of requests and tokens. It never touches the model, the clock or costs; a
driver answers each request, for one sequence immediately or for many together. Answers are lazy
arrays. Only `Read` waits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import mlx.core as mx

from cognica_mlx.decoding.choosing import Choice, How
from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.decoding.targets import Target
from cognica_mlx.network.stages import Stage


@dataclass(frozen=True, eq=False)
class Advance:
    """Run the oldest `rows` positions pending before stage `index`; None means all of them.

    With `last`, everything continues through the stages up to that one: a driver may run several
    at once (see `passes.course`), with `rest` as the next request, and answers the mode after the
    last.
    """

    state: DecodingState
    index: int
    rows: int | None = None
    last: int = -1

    @property
    def stage(self) -> Stage:
        """The stage object; requests for the same one can share a pass."""
        return self.state.stages[self.index]

    @property
    def count(self) -> int:
        """How many positions the pass has."""
        pending = self.state.pending(self.index)
        return pending if self.rows is None else min(self.rows, pending)

    def goes_on(self, length: int, stage: Stage) -> bool:
        """Whether its positions are to go through `stage` too, `length` stages later, and no
        others wait there."""
        index, state = self.index + length, self.state
        if index > self.last or state.stages[index] is not stage or stage.source != index:
            return False
        return not state.pending(index)

    def rest(self) -> Advance | None:
        """The request that remains after the pass through stage `index`, or None."""
        return _first_pass(self.state, self.index + 1, self.last)


@dataclass(frozen=True, eq=False)
class Score:
    """The prediction of `target` from the last `rows` positions before `end` (default: the end of
    the text): scores (rows, V) float32, or with a `choice` what `choose` returns for those."""

    state: DecodingState
    target: Target
    rows: int = 1
    end: int | None = None
    choice: Choice | None = None

    @property
    def kind(self) -> tuple[Target, How | None]:
        """Requests of equal kinds can share the work."""
        return self.target, self.choice.how if self.choice else None


@dataclass(frozen=True, eq=False)
class Read:
    """The numbers in `arrays`, as (nested) lists. Waits for them, then starts on `ahead`.

    `ahead` starts only after the wait: before that the caches would still be in use, and MLX would
    copy them.
    """

    state: DecodingState
    arrays: tuple[mx.array, ...]
    ahead: tuple[mx.array, ...] = ()


@dataclass(frozen=True, eq=False)
class Submit:
    """Start computing everything that the state holds, once what was submitted before is done."""

    state: DecodingState


Request = Advance | Score | Read | Submit


@dataclass(frozen=True)
class DecodedToken:
    """One token: its id, its log-probability under the scores that chose or confirmed it (after
    bias and penalties, before temperature and filters), the stage that emitted it, and its drafter,
    if any (see `drafters`). `forced` means that a constraint allowed no other token: its
    log-probability is 0, and no stage was asked. `top` has the best tokens and their
    log-probabilities, best first, if the options ask for them."""

    token: int
    logprob: float
    stage: int
    drafter: str | None = None
    forced: bool = False
    top: tuple[tuple[int, float], ...] = ()

    @property
    def from_draft(self) -> bool:
        return self.drafter is not None


def reported(chosen: Mapping[str, mx.array]) -> tuple[mx.array, ...]:
    """Of what `choose` returns, the arrays that a `DecodedToken` reports: the token, its
    log-probability and, if asked for, the best tokens and theirs."""
    names = ("token", "logprob", "best", "best_logprobs")
    return tuple(chosen[name] for name in names if name in chosen)


def top_of(best: Sequence[Sequence[Sequence[Any]]], row: int) -> tuple[tuple[int, float], ...]:
    """`DecodedToken.top` from a row of the best tokens and their log-probabilities after reading,
    without impossible tokens."""
    if not best:
        return ()
    ids, logprobs = best
    pairs = zip(ids[row], logprobs[row], strict=True)
    return tuple((token, logprob) for token, logprob in pairs if logprob > -inf)


# The type of a mode's generator: requests and tokens go out, answers come back.
Steps = Generator[Request | DecodedToken, Any, None]


class Resumable(Generator[Request | DecodedToken, Any, None]):
    """Steps that can be begun again after an interruption: `make` is called for new ones, which
    must go on after the last token emitted."""

    def __init__(self, make: Callable[[], Steps]):
        self._make = make
        self._steps: Steps | None = None

    def restart(self) -> None:
        """End the steps; the next `send` begins them again, whatever it answers."""
        self.close()
        self._steps = None

    def send(self, answer: Any, /) -> Request | DecodedToken:
        if self._steps is None:
            self._steps, answer = self._make(), None
        return self._steps.send(answer)

    def throw(self, error: Any, /, *_: Any) -> Request | DecodedToken:
        """Raise an error where the steps are. New ones will meet it by themselves."""
        return self._steps.throw(error) if self._steps else self.send(None)

    def close(self) -> None:
        self._steps = self._steps or self._make()
        self._steps.close()


def through(state: DecodingState, depth: int) -> Generator[Request, Any, None]:
    """Run everything that is pending through the stages up to `depth`."""
    if request := _first_pass(state, 0, depth):
        yield request
    yield from _run_late(state)


def advance(
    state: DecodingState, stage: int, rows: int | None = None
) -> Generator[Request, Any, None]:
    """Run what is pending before `stage`, then whatever is overdue before deeper stages."""
    if state.pending(stage):
        yield Advance(state, stage, rows)
    yield from _run_late(state)


def _first_pass(state: DecodingState, first: int, last: int) -> Advance | None:
    """The pass to run first if stages `first` to `last` are to have nothing pending."""
    for stage in range(first, last + 1):
        if state.pending(stage):
            return Advance(state, stage, last=last)
    return None


def _run_late(state: DecodingState) -> Generator[Request, Any, None]:
    """Run what is overdue before deeper stages: see `DecodingState.overdue`."""
    while (late := state.overdue()) is not None:
        yield Advance(state, late, state.max_pending)


def as_row(token: int) -> mx.array:
    """One token id as the (1, 1) int32 array that a state appends."""
    return mx.array([[token]], dtype=mx.int32)
