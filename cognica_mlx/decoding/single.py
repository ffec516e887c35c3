"""The driver for one sequence: every request is carried out immediately.

- in: a sequence's steps
- out: its tokens, one by one
- a pass that fails or is interrupted leaves the state at its last complete position
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Protocol

import mlx.core as mx

from cognica_mlx.decoding.passes import course, read, run_stages, score, submit
from cognica_mlx.decoding.requests import (
    Advance,
    DecodedToken,
    Read,
    Request,
    Score,
    Steps,
    Submit,
    through,
)
from cognica_mlx.decoding.sequence import DecodingSequence, Mode, read_prompt, ready
from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.errors import RankLostError
from cognica_mlx.network.model import PoEModel


class Driver(Protocol):
    """Carries out requests."""

    def answer(self, request: Request) -> Any:
        """The answer to a request, or None if it only asks for work. An `Advance` gets the
        passes of its `course`; its `rest` is the next request."""


_WORK: dict[type, Callable[[Any], list[Any]]] = {Score: score, Read: read}


class Single:
    """A `Driver` that answers each request as it comes."""

    def __init__(self) -> None:
        self._submitted: list[mx.array] = []

    def answer(self, request: Request) -> Any:
        if isinstance(request, Submit):
            self._submitted = submit(request.state, self._submitted)
            return None
        if isinstance(request, Advance):
            run_stages([request], course([request]))
            return None
        return _WORK[type(request)]([request])[0]


def drive(steps: Steps, driver: Driver | None = None) -> Generator[DecodedToken, None, None]:
    """The tokens that `steps` emits; the driver is `Single` by default."""
    driver, answer, lost = driver or Single(), None, None
    try:
        while True:
            try:
                step = steps.throw(lost) if lost else steps.send(answer)
            except StopIteration:
                return
            answer = lost = None
            if isinstance(step, DecodedToken):
                yield step
                continue
            try:
                answer = _answer(driver, step)
            except RankLostError as error:
                lost = error  # the sequence may be able to go on
    finally:
        steps.close()


def _answer(driver: Driver, request: Request) -> Any:
    """The driver's answer, after all passes that the request needs."""
    answer = driver.answer(request)
    while isinstance(request, Advance) and (rest := request.rest()):
        answer, request = driver.answer(rest), rest
    return answer


def decode(
    model: PoEModel,
    prompt: Sequence[int],
    mode: Mode,
    *,
    driver: Driver | None = None,
    **options: Any,
) -> Generator[DecodedToken, None, None]:
    """Decode tokens after the token ids `prompt`. Options are those of `DecodingSequence`.

    If `state` already holds the beginning of the prompt, only the rest is run. Afterwards it holds
    the prompt and the tokens taken from this iterator, possibly without the last, because nothing
    has been predicted from it yet.
    """
    yield from drive(DecodingSequence(model, prompt, mode, **options).steps(), driver)


def carry_out(requests: Iterable[Request]) -> None:
    """Carry out requests that emit no tokens."""
    driver = Single()
    for request in requests:
        _answer(driver, request)


def advance_through(state: DecodingState, depth: int) -> None:
    """Run everything that is pending through the stages up to `depth`."""
    with state.in_use():
        carry_out(through(state, depth))


def prefill(state: DecodingState, tokens: Sequence[int], depth: int) -> None:
    """Append tokens and run them through the stages up to `depth`. If stages kept ready have
    dropped pending positions of the earlier text, that is run again first."""
    with state.in_use():
        carry_out(ready(state, state.depth))
        carry_out(read_prompt(state, tokens, depth))
        mx.eval(state.arrays())
    mx.clear_cache()


def set_depth(state: DecodingState, depth: int) -> None:
    """Make `depth` the deepest stage that is kept ready: see `ready`."""
    with state.in_use():
        carry_out(ready(state, depth))
