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

from cognica_mlx.cache.hidden import Hidden
from cognica_mlx.decoding.quantized_prefix import QuantizedPrefix
from cognica_mlx.decoding.requests import advance
from cognica_mlx.decoding.sampling import logprob_of, margin
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
    if state is None:
        state = DecodingState(prefix.model)
        prefill(state, text, state.depth)
    length, rounds = state.length, []
    for _ in range(trials + 1):
        times = []
        for count in rows:
            aside = state.aside(prefix.stages, prefix.of)
            aside.append([0] * count)
            ran = [_seconds(partial(_advance, aside, k)) for k in range(len(prefix.stages))]
            boundaries = prefix.target.boundaries
            hidden = {k: aside.boundary(k, length, length + count) for k in boundaries}
            times.append([*ran, _seconds(partial(_chosen, prefix.target.scores, hidden))])
            state.next_round()
        rounds.append(times)
    *stages, head = np.median(rounds[1:], axis=0).T.tolist()
    return Costs(tuple(rows), tuple(map(tuple, stages)), (tuple(head),), (0,))


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
    started = time.perf_counter()
    if state is None:
        state = DecodingState(model)
        prefill(state, text, state.depth)
    stages, length = range(model.poe_n_stages), state.length
    rounds: list[list[Any]] = []
    while len(rounds) < 2 or (len(rounds) <= trials and time.perf_counter() - started < seconds):
        times = []
        for count in rows:
            state.append([0] * count)
            mx.eval(state.arrays())
            ran = [_seconds(partial(_advance, state, k)) for k in stages]
            hidden = [state.boundary(k, length, length + count) for k in stages]
            chosen = [_seconds(partial(_choose, model, k, h)) for k, h in enumerate(hidden)]
            times.append([ran, chosen])
            state.rollback(length)
        rounds.append(times)
    layers, heads = np.median(rounds[1:], axis=0).transpose(1, 2, 0).tolist()
    return Costs(
        tuple(rows), tuple(map(tuple, layers)), tuple(map(tuple, heads)), model.full_boundaries
    )


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


def _choose(model: PoEModel, stage: int, hidden: Hidden) -> list[mx.array]:
    return _chosen(partial(model.stage_logits, stage), hidden)


def _chosen(predict: Callable[[Any], mx.array], hidden: Any) -> list[mx.array]:
    scores = predict(hidden)[0]
    chosen = mx.argmax(scores, axis=-1)
    return [chosen, logprob_of(scores, chosen), margin(scores)]
