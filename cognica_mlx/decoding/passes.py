"""How drivers carry out requests: passes through a stage, predictions, reading numbers.

Each function takes requests of one or more sequences that can share the work. A pass builds the
graph for all of them before any state changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from cognica_mlx.backend.kernels import FEW
from cognica_mlx.cache.fixed_pass import FixedPass
from cognica_mlx.cache.hidden import Hidden, Rows, pack
from cognica_mlx.cache.keys_and_values import Done
from cognica_mlx.decoding.choosing import Choice, How, choose, operands
from cognica_mlx.decoding.requests import Advance, Read, Score
from cognica_mlx.decoding.state import DecodingState, Text
from cognica_mlx.decoding.targets import Target
from cognica_mlx.network.model import PoEModel
from cognica_mlx.network.stages import Stage, replay


def course(requests: Sequence[Advance], until: Stage | None = None) -> int:
    """How many stages the same positions of all requests go through one after the other, before
    the stage `until`. They must be for the same stage."""
    first = requests[0]
    length = 1
    while first.index + length <= first.last:
        stage = first.state.stages[first.index + length]
        if stage is until or not all(request.goes_on(length, stage) for request in requests):
            break
        length += 1
    return length


def run_stages(requests: Sequence[Advance], length: int = 1) -> list[None]:
    """Run all requests, which must be for the same stage, through it and those that follow,
    `length` in all (see `course`): one pass for all of them in each stage."""
    answers = [None] * len(requests)
    # After an interruption between a pass and its answers, a request may have no rows left.
    asked = [(request, count) for request in requests if (count := request.count)]
    if not asked:
        return answers
    passes = [_Pass(asked, later) for later in range(length)]
    if length > 1 and all(one.joins(passes[0]) for one in passes):
        results = replay([one.stage for one in passes], passes[0].take(), [p.plan for p in passes])
        for one, result in zip(passes, results, strict=True):
            one.put(*result)
    else:
        for one in passes:
            one.put(*one.stage.run(one.take(), one.plan))
    return answers


class _Pass:
    """A pass of several requests' positions through the stage that is `later` stages after the one
    they are for, in an order that suits their caches."""

    def __init__(self, asked: Sequence[tuple[Advance, int]], later: int):
        first, _ = asked[0]
        self.stage = first.state.stages[first.index + later]
        caches = [request.state.caches[request.index + later] for request, _ in asked]
        counts = [count for _, count in asked]
        self.order = self.stage.order(caches, counts)
        self.work = [(asked[i][0].state, asked[i][0].index + later, counts[i]) for i in self.order]
        self.plan = self.stage.plan([caches[i] for i in self.order], [c for _, _, c in self.work])

    def joins(self, other: _Pass) -> bool:
        """Whether both can run from one trace."""
        mine, theirs = self.plan, other.plan
        if not (isinstance(mine, FixedPass) and isinstance(theirs, FixedPass)):
            return False
        same_rows = mine.rows == theirs.rows and mine.starts == theirs.starts
        return same_rows and self.order == other.order

    def take(self) -> Hidden:
        """The positions, as the stage's input."""
        taken = [state.take(index, count) for state, index, count in self.work]
        texts = [one for one in taken if isinstance(one, Text)]
        if texts:
            return embed([state.model for state, _, _ in self.work], texts)
        return pack([rows for pieces in taken for rows in pieces])  # type: ignore[union-attr]

    def put(self, hidden: Hidden, done: Sequence[Done]) -> None:
        """Store the result in the states."""
        for (state, index, count), start, one in zip(
            self.work, self.plan.starts, done, strict=True
        ):
            state.put(index, Rows(hidden, start, start + count), one)


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


def score(requests: Sequence[Score]) -> list[Any]:
    """The answers to requests of one `kind`."""
    target = requests[0].target
    hidden = {}
    for boundary in target.boundaries:
        pieces = []
        for request in requests:
            end = request.state.length if request.end is None else request.end
            pieces += request.state.rows(boundary, end - request.rows, end)
        hidden[boundary] = pack(pieces)
    model = requests[0].state.model
    choices = [request.choice for request in requests if request.choice]
    rows = tuple([request.rows for request in requests])
    answer = _Answer(target, choices, rows, hidden)
    if sum(rows) > FEW or any(stage.rank for stage in model.stages):
        return answer.apart(answer(*answer.arrays))
    return answer.apart(model.traces.run(answer.key, answer, answer.arrays))


# The names of what `choose` returns.
_names: dict[How, tuple[str, ...]] = {}


class _Answer:
    """The answers to requests for `rows` of a target's scores, as a function of `arrays`."""

    def __init__(
        self,
        target: Target,
        choices: Sequence[Choice],
        rows: tuple[int, ...],
        hidden: Mapping[int, Hidden],
    ):
        self._target, self._rows, self._hidden = target, rows, hidden
        self._how = choices[0].how if choices else None
        given = operands(choices) if choices else {}
        self._given = tuple(given)
        self.arrays = list(given.values())
        for one in hidden.values():
            self.arrays += [one.x] if one.backout is None else [one.x, one.backout]
        backouts = tuple([one.backout is not None for one in hidden.values()])
        dtype = next(iter(hidden.values())).x.dtype.size
        self.key = "score", target.key, self._how, rows, self._given, backouts, dtype

    def __call__(self, *arrays: mx.array) -> list[mx.array]:
        """All results for the first request, then for the next."""
        streams = iter(arrays[len(self._given) :])
        hidden = {}
        for boundary, one in self._hidden.items():
            x, backout = next(streams), None if one.backout is None else next(streams)
            hidden[boundary] = Hidden(one.tokens, x, x, backout)
        scores = self._target.scores(hidden).squeeze(0)
        found = {"scores": scores}
        if self._how:
            given = dict(zip(self._given, arrays, strict=False))
            found = choose(self._how, scores, **given)
            _names[self._how] = tuple(found)
        if len(self._rows) == 1:
            return list(found.values())
        ends = [*itertools.accumulate(self._rows)][:-1]
        parts = [mx.split(array, ends) for array in found.values()]
        return [array for one in zip(*parts, strict=True) for array in one]

    def apart(self, results: Sequence[mx.array]) -> list[Any]:
        """Each request's answer."""
        if self._how is None:
            return list(results)
        names = _names[self._how]
        each = [results[i : i + len(names)] for i in range(0, len(results), len(names))]
        return [dict(zip(names, one, strict=True)) for one in each]


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
