"""The cost of each part of a decoding step: each stage and each head, by number of rows.

- in bytes of weights read, which bound decoding; the same for a batch of rows as for one row
- or in seconds on this machine: how much more a batch costs than one row differs between chips,
  and decides whether drafting or exiting early pays
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_reduce

from cognica_mlx.cache.hidden import Hidden
from cognica_mlx.decoding.requests import advance
from cognica_mlx.decoding.rounded_prefix import RoundedPrefix
from cognica_mlx.decoding.sampling import logprob_of, margin
from cognica_mlx.decoding.single import carry_out, prefill
from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.decoding.targets import Target
from cognica_mlx.network.model import PoEModel
from cognica_mlx.network.stages import Block

ROWS = (1, 2, 4, 8)
CONTEXT = 32
TRIALS = 3


@dataclass(frozen=True)
class Costs:
    """Costs of a batch of `rows[i]` positions: stages[k][i] for stage k's layers, heads[k][i] for
    stage k's prediction. Costs for other numbers of rows are interpolated linearly.

    `full_boundaries` are the stages that the full model's prediction reads. `shortlists` has the
    cost of one prediction from a shortlist, by rank. `rounded` has a rounded drafter's costs: its
    own stages, and its prediction as a single head.
    """

    rows: tuple[int, ...]
    stages: tuple[tuple[float, ...], ...]
    heads: tuple[tuple[float, ...], ...]
    full_boundaries: tuple[int, ...]
    shortlists: Mapping[int, float] = field(default_factory=dict)
    rounded: Costs | None = None

    def stage(self, stage: int, rows: int = 1) -> float:
        """Cost of a batch through the layers of `stage`."""
        return self._at(self.stages[stage], rows)

    def head(self, stage: int, rows: int = 1) -> float:
        """Cost of the prediction of `stage` for a batch."""
        return self._at(self.heads[stage], rows)

    def full_head(self, rows: int = 1) -> float:
        """Cost of the full model's prediction for a batch, without its layers."""
        return sum(self.head(k, rows) for k in self.full_boundaries)

    def upper(self, stage: int, rows: int = 1) -> float:
        """Cost of a batch through all layers after `stage` and the full model's head."""
        return self.between(stage, rows) + self.full_head(rows)

    def between(self, stage: int, rows: int = 1) -> float:
        """Cost of a batch through all layers after `stage`."""
        return sum(self.stage(k, rows) for k in range(stage + 1, len(self.stages)))

    def lower(self, stage: int, rows: int = 1) -> float:
        """Cost of a batch through all layers up to `stage`."""
        return sum(self.stage(k, rows) for k in range(stage + 1))

    def target(self, target: Target, rows: int = 1) -> float:
        """Cost of a target's prediction for a batch."""
        if target.rank is not None and target.rank in self.shortlists:
            return self.shortlists[target.rank]
        return target.share * sum(self.head(k, rows) for k in target.heads)

    def full_pass(self, rows: int = 1) -> float:
        """Cost of a batch at full depth."""
        return self.lower(len(self.stages) - 1, rows) + self.full_head(rows)

    @property
    def full_token(self) -> float:
        """Cost of one token at full depth."""
        return self.full_pass()

    def _at(self, costs: Sequence[float], rows: int) -> float:
        if rows > self.rows[-1] and len(self.rows) > 1:
            slope = (costs[-1] - costs[-2]) / (self.rows[-1] - self.rows[-2])
            return costs[-1] + max(slope, 0) * (rows - self.rows[-1])
        return float(np.interp(rows, self.rows, costs))


def bytes_read(model: PoEModel) -> Costs:
    """Costs in bytes of weights, from the model's own arrays."""
    stages, heads = [], []
    for stage in range(model.poe_n_stages):
        stages.append(sum(map(_streamed, model.stages[stage].blocks)))
        heads.append(sum(map(nbytes, model.heads(stage))))
    return Costs((1,), _single(stages), _single(heads), model.full_boundaries)


def with_bytes_of(costs: Costs, prefix: RoundedPrefix) -> Costs:
    """`costs` with an estimate for a rounded drafter that was not measured: each part's cost is the
    model's, scaled by its share of the bytes."""

    def share(copies: Sequence[nn.Module], originals: Sequence[nn.Module]) -> float:
        return sum(map(_streamed, copies)) / sum(map(_streamed, originals))

    stages = []
    for stage, of in zip(prefix.stages, prefix.of, strict=True):
        part = share(stage.blocks, prefix.model.stages[of].blocks)
        stages.append(tuple(part * cost for cost in costs.stages[of]))
    part = share(prefix.heads, prefix.originals)
    heads = [costs.target(prefix.target, rows) for rows in costs.rows]
    made = Costs(costs.rows, tuple(stages), (tuple(part * head for head in heads),), (0,))
    return replace(costs, rounded=made)


def measure_drafter(
    prefix: RoundedPrefix,
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
    ranks: Sequence[int] = (),
) -> Costs:
    """Costs in seconds after the tokens of `text`: medians of up to `trials` rounds, after one
    warm-up round. At least one round is kept; `seconds` limits the others.

    A `state` that already holds the text saves reading it, and is restored. A prediction's time
    covers its logits and choosing a token from them; shortlists of `ranks` are timed for one row.
    The host waits after every part, which overstates the costs of small models.
    """
    started = time.perf_counter()
    if state is None:
        state = DecodingState(model)
        prefill(state, text, state.depth)
    stages, length = range(model.poe_n_stages), state.length
    short = [model.with_shortlist(rank) for rank in ranks]
    rounds: list[list] = []
    searches: list[list[float]] = []
    while len(rounds) < 2 or (len(rounds) <= trials and time.perf_counter() - started < seconds):
        times = []
        for count in rows:
            state.append([0] * count)
            mx.eval(state.arrays())
            ran = [_seconds(partial(_advance, state, k)) for k in stages]
            hidden = [state.boundary(k, length, length + count) for k in stages]
            chosen = [_seconds(partial(_choose, model, k, h)) for k, h in enumerate(hidden)]
            times.append([ran, chosen])
            if count == rows[0]:
                searches.append([_seconds(partial(_choose, s, 0, hidden[0][:1])) for s in short])
            state.rollback(length)
        rounds.append(times)
    layers, heads = np.median(rounds[1:], axis=0).transpose(1, 2, 0).tolist()
    found = np.median(searches[1:], axis=0).tolist() if ranks else []
    return Costs(
        tuple(rows),
        tuple(map(tuple, layers)),
        tuple(map(tuple, heads)),
        model.full_boundaries,
        dict(zip(ranks, found, strict=True)),
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


def _streamed(module: nn.Module) -> int:
    """Bytes of a module that a pass reads; embedding tables, read one row a token, are left out."""
    table = (
        module.attn.value_embed
        if isinstance(module, Block) and "value_embed" in module.attn
        else None
    )
    return nbytes(module) - (nbytes(table) if table else 0)


def _single(costs: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    return tuple((float(cost),) for cost in costs)


def nbytes(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return tree_reduce(lambda total, array: total + array.nbytes, module.parameters(), 0)
