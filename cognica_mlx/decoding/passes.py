"""How drivers carry out requests: passes through a stage, predictions, reading numbers.

Each function takes requests of one or more sequences that can share the work. A pass builds the
graph for all of them before any state changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from cognica_mlx.cache.hidden import Hidden, Rows, pack
from cognica_mlx.decoding.requests import Advance, Read, Score
from cognica_mlx.decoding.sampling import Scores
from cognica_mlx.decoding.state import DecodingState, Text
from cognica_mlx.network.model import PoEModel


def run_stage(requests: Sequence[Advance]) -> list[None]:
    """Run all requests, which must be for the same stage, in one pass."""
    answers = [None] * len(requests)
    # After an interruption between a pass and its answers, a request may have no rows left.
    asked = [(r, r.state.caches[r.index], n) for r in requests if (n := r.count)]
    if not asked:
        return answers
    stage = requests[0].stage
    order = stage.order([cache for _, cache, _ in asked], [count for _, _, count in asked])
    requests, caches, counts = zip(*(asked[i] for i in order), strict=True)
    taken = [r.state.take(r.index, n) for r, n in zip(requests, counts, strict=True)]
    if isinstance(taken[0], Text):
        models = [request.state.model for request in requests]
        hidden = embed(models, taken)
    else:
        hidden = pack([rows for pieces in taken for rows in pieces])
    hidden, done = stage.run(hidden, caches, counts)
    start = 0
    for request, count, one in zip(requests, counts, done, strict=True):
        request.state.put(request.index, Rows(hidden, start, start + count), one)
        start += count
    return answers


def embed(models: Sequence[PoEModel], texts: Sequence[Text]) -> Hidden:
    """The texts, each embedded and smeared by its model, joined along T: (1, total, D)."""
    if len(texts) == 1:
        return models[0].embed(texts[0].tokens, texts[0].previous)
    parts: list[Hidden] = []
    single: list[Text] = []

    def finish(model: PoEModel) -> None:
        """Embed the single tokens collected so far as one batch of one-token texts."""
        if single:
            tokens = mx.concatenate([text.tokens for text in single])  # (n, 1)
            previous = mx.concatenate([text.previous for text in single])  # type: ignore[misc]
            batch = model.embed(tokens, previous)
            x = batch.x.reshape(1, len(single), -1)
            parts.append(Hidden(tokens.reshape(1, -1), x, x))
            single.clear()

    for i, (model, text) in enumerate(zip(models, texts, strict=True)):
        if i and model.wte is not models[i - 1].wte:
            finish(models[i - 1])
        if text.tokens.shape[1] == 1 and text.previous is not None:
            single.append(text)
            continue
        finish(model)
        parts.append(model.embed(text.tokens, text.previous))
    finish(models[-1])
    return Hidden.concatenate(parts)


def score(requests: Sequence[Score]) -> list[Scores]:
    """The predictions for requests that share a target, one `Scores` for each."""
    target = requests[0].target
    hidden = {}
    for boundary in target.boundaries:
        pieces = []
        for request in requests:
            end = request.state.length if request.end is None else request.end
            pieces += request.state.rows(boundary, end - request.rows, end)
        hidden[boundary] = pack(pieces)
    scores = Scores(target.scores(hidden)[0])
    ends = itertools.accumulate(request.rows for request in requests)
    return [scores.part(end - r.rows, end) for r, end in zip(requests, ends, strict=True)]


def read(requests: Sequence[Read]) -> list[list[Any]]:
    """The numbers in each request's arrays, after one wait for all; then starts on all `ahead`."""
    if arrays := [request.arrays for request in requests if request.arrays]:
        mx.eval(arrays)
    numbers = [[array.tolist() for array in request.arrays] for request in requests]
    if ahead := [request.ahead for request in requests if request.ahead]:
        mx.async_eval(ahead)
    for request in requests:
        request.state.next_round()
    return numbers


def submit(state: DecodingState, before: Sequence[mx.array]) -> list[mx.array]:
    """Start computing everything that the state holds, once `before` is done. Returns what to wait
    for next time."""
    if before:
        mx.eval(before)
    arrays = state.arrays()
    mx.async_eval(arrays)
    state.next_round()
    # Work finishes in order, so the last array is enough. Holding the caches' arrays would keep
    # them from being written in place.
    return arrays[-1:]
