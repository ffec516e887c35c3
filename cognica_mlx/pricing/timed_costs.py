"""Measures the costs of a decoding step on this machine, in seconds.

How much more a batch costs than one row differs between chips, and decides whether drafting or
exiting early pays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from cognica_mlx.decoding.choosing import logprob_of, margin
from cognica_mlx.decoding.quantized_prefix import QuantizedPrefix
from cognica_mlx.decoding.requests import advance
from cognica_mlx.decoding.single import carry_out, prefill
from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.costs import Costs

ROWS = (1, 2, 4, 8)
CONTEXT = 32
TRIALS = 3


def measure_drafter(
    prefix: QuantizedPrefix,
    rows: Sequence[int] = ROWS,
    *,
    text: Sequence[int] = (0,) * CONTEXT,
    trials: int = TRIALS,
    state: DecodingState | None = None,
) -> Costs:
    """A rounded drafter's costs in seconds, measured as in `measure`."""
    full = state or _after(prefix.model, text)
    length, stages = full.length, range(len(prefix.stages))

    def times(count: int) -> list[float]:
        aside = full.aside(prefix.stages, prefix.of)
        aside.append([0] * count)
        ran = [_seconds(partial(_advance, aside, k)) for k in stages]
        boundaries = prefix.target.boundaries
        hidden = {k: aside.boundary(k, length, length + count) for k in boundaries}
        ran.append(_seconds(partial(_chosen, prefix.target.scores, hidden)))
        full.next_round()
        return ran

    return _medians(rows, len(stages), (0,), times, trials)


def measure(
    model: PoEModel,
    rows: Sequence[int] = ROWS,
    *,
    text: Sequence[int] = (0,) * CONTEXT,
    trials: int = TRIALS,
    seconds: float = float("inf"),
    state: DecodingState | None = None,
) -> Costs:
    """Costs in seconds after the tokens of `text`: medians of up to `trials` rounds, after one
    warm-up round. At least one round is kept; `seconds` limits the others.

    A `state` that already holds the text saves reading it, and is restored. A prediction's time
    covers its logits and choosing a token from them. The host waits after every part, which
    overstates the costs of small models.
    """
    ends = time.perf_counter() + seconds
    full = state or _after(model, text)
    stages, length = range(model.poe_n_stages), full.length

    def times(count: int) -> list[float]:
        full.append([0] * count)
        mx.eval(full.arrays())
        ran = [_seconds(partial(_advance, full, k)) for k in stages]
        hidden = [full.boundary(k, length, length + count) for k in stages]
        for k, h in enumerate(hidden):
            ran.append(_seconds(partial(_chosen, partial(model.stage_logits, k), h)))
        full.rollback(length)
        return ran

    return _medians(rows, len(stages), model.full_boundaries, times, trials, ends)


def _after(model: PoEModel, text: Sequence[int]) -> DecodingState:
    state = DecodingState(model)
    prefill(state, text, state.depth)
    return state


def _medians(
    rows: Sequence[int],
    stages: int,
    full_boundaries: tuple[int, ...],
    times: Callable[[int], list[float]],
    trials: int,
    ends: float = float("inf"),
) -> Costs:
    """Costs from `times` of so many rows: first the seconds of each of `stages`, then of heads."""
    rounds: list[list[list[float]]] = []
    while len(rounds) < 2 or (len(rounds) <= trials and time.perf_counter() < ends):
        rounds.append([times(count) for count in rows])
    parts = tuple(map(tuple, np.median(rounds[1:], axis=0).T.tolist()))
    return Costs(tuple(rows), parts[:stages], parts[stages:], full_boundaries)


def _seconds(work: Callable[[], list[mx.array]]) -> float:
    started = time.perf_counter()
    mx.eval(work())
    return time.perf_counter() - started


def _advance(state: DecodingState, stage: int) -> list[mx.array]:
    start = state.filled[stage]
    carry_out(advance(state, stage))
    state.next_round()
    hidden = state.boundary(stage, start, state.filled[stage])
    # Reading `x` explicitly: otherwise a stage on another machine would not be waited for.
    return [hidden.x, *hidden.arrays()]


def _chosen(predict: Callable[[Any], mx.array], hidden: Any) -> list[mx.array]:
    scores = predict(hidden)[0]
    chosen = mx.argmax(scores, axis=-1)
    return [chosen, logprob_of(scores, chosen), margin(scores)]
