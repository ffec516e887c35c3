"""The predictors to evaluate: stages, mixtures of the first stages, WAND, the full model.

- in: a model, and the names that a user chose
- out: predictors by name, and all their predictions from one set of activations
- WAND picks one of the other predictors at each position, so it needs no pass of its own
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from cognica_mlx.cache.hidden import Hidden
from cognica_mlx.decoding.modes import ModeOptions, make_mode
from cognica_mlx.decoding.targets import (
    Target,
    composed_target,
    full_target,
    prefix_target,
    stage_target,
)
from cognica_mlx.decoding.wand import Wand
from cognica_mlx.errors import RequestError
from cognica_mlx.network.model import PoEModel, log_op
from cognica_mlx.pricing.replaying import Trace

FULL = "full"

Logits = Mapping[int, mx.array]


@dataclass(frozen=True)
class Predictor:
    """One predictor. `mode` and `options` decode with it; `target` says what it reads.

    `combine(logits, hidden)` makes its scores (1, T, V) of the stages' logits and activations. WAND
    picks one of `tested` instead: it exits at stage k if the best token of `tested[k]` leads by
    more than `exits[k]`; the last of them is the full model, which is always accepted.
    """

    name: str
    mode: str
    options: Mapping[str, Any]
    target: Target
    combine: Callable[[Logits, Mapping[int, Hidden]], mx.array] = field(repr=False)
    exits: Mapping[int, float] = field(default_factory=dict)
    tested: tuple[Predictor, ...] = ()


@dataclass(frozen=True)
class Facts:
    """For T scored positions and P predictors: logprobs (P, T), in nats, of the actual token; best
    (P, T), the best token; margins (P, T), its lead."""

    logprobs: np.ndarray
    best: np.ndarray
    margins: np.ndarray


@dataclass(frozen=True)
class Scored:
    """What R predictors say about T positions, (R, T) each: the log-probability of the actual
    token, in nats, the best token, whether the full model's is the same, and how many stages were
    run."""

    logprobs: np.ndarray
    best: np.ndarray
    agrees: np.ndarray
    depths: np.ndarray


def stage(model: PoEModel, number: int) -> Predictor:
    """One stage alone."""
    target, options = stage_target(model, number), {"stage": number}
    return Predictor(f"stage {number}", "stage", options, target, lambda z, _: z[number])


def mixture(model: PoEModel, last: int) -> Predictor:
    """The Log-OP of stages 0 to `last`. If each stage has its own head, the mode `prefix` decodes
    with it, otherwise the mode `compose`."""
    model.check_stage(last)
    name, stages = f"stages 0-{last}", list(range(last + 1))
    options: dict[str, Any]
    if model.pools_stages:
        way, options, target = "prefix", {"max_stages": last + 1}, prefix_target(model, last + 1)
        mix = model.pool
    else:
        way, options, target = "compose", {"stages": stages}, composed_target(model, stages)
        mix = partial(log_op, weights=[1 / len(stages)] * len(stages))
    return Predictor(name, way, options, target, lambda z, _: mix([z[k] for k in stages]))


def full(model: PoEModel) -> Predictor:
    """The full model."""
    target = full_target(model)
    return Predictor(FULL, FULL, {}, target, lambda z, hidden: model.full_scores(hidden, z))


def wand(model: PoEModel, safety: float) -> Predictor:
    """WAND with the model's own calibration. RequestError if there is none."""
    mode = make_mode(model, "wand", ModeOptions(safety=safety), model.calibration)
    assert isinstance(mode, Wand)
    # With a head per stage WAND tests the pool so far, otherwise the stage alone.
    before = [
        mixture(model, k) if model.pools_stages and k else stage(model, k)
        for k in range(model.poe_n_stages - 1)
    ]
    name, options, last = f"wand {safety:g}", {"safety": safety}, full(model)
    tested = (*before, last)
    return replace(last, name=name, mode="wand", options=options, exits=mode.exits, tested=tested)


def chosen(model: PoEModel, names: Sequence[str]) -> list[Predictor]:
    """The predictors for a user's names: `all`, `full`, a stage `2`, a mixture `0-2`.

    `all` leaves out other names for the full model. Raises RequestError for an unknown name.
    """
    last = model.poe_n_stages - 1
    found: dict[str, Predictor] = {}
    for name in names:
        if name == "all":
            solo = range(last if model.config.specialist_layers else last + 1)
            mixed = range(1, last if model.pools_stages else last + 1)
            some = [*(stage(model, k) for k in solo), *(mixture(model, k) for k in mixed)]
            some.append(full(model))
        elif name == FULL:
            some = [full(model)]
        elif name.isdecimal():
            some = [stage(model, int(name))]
        elif (end := name.removeprefix("0-")).isdecimal() and int(end):
            some = [mixture(model, int(end))]
        else:
            raise RequestError(
                f"stages: {name!r} is not all, {FULL}, a stage such as 1, or a mixture of the "
                "first stages such as 0-1"
            )
        found.update((one.name, one) for one in some)
    return list(found.values())


class Predictors:
    """The predictors to report, and all those that must be computed for them.

    `shown` are reported, in this order. `computed` also includes those that WAND tests, and the
    full model to compare with. `target` computes all P of them at once, with scores (1, T, P, V)
    in float32.
    """

    def __init__(self, model: PoEModel, fixed: Sequence[Predictor], safeties: Sequence[float] = ()):
        self.model = model
        adaptive = [wand(model, safety) for safety in safeties]
        self.shown = [*fixed, *adaptive]
        needed = [*fixed, full(model), *(p for one in adaptive for p in one.tested)]
        self.computed = list({one.name: one for one in needed}.values())
        self.index = {one.name: i for i, one in enumerate(self.computed)}
        stages = sorted({k for one in self.computed for k in one.target.boundaries})
        key = ("predictors", id(self), *self.index)
        self.target = Target(key, tuple(stages), self._scores, tuple(stages))

    @property
    def names(self) -> list[str]:
        """The names of the predictors that are reported."""
        return [one.name for one in self.shown]

    def _scores(self, hidden: Mapping[int, Hidden]) -> mx.array:
        logits = {k: self.model.stage_logits(k, h) for k, h in hidden.items()}
        return mx.stack([one.combine(logits, hidden) for one in self.computed], axis=2)

    def report(self, facts: Facts) -> Scored:
        """The results of the predictors in `shown`, from those in `computed`."""
        at = np.arange(facts.best.shape[1])
        source, depths = np.array([self._sources(one, facts) for one in self.shown]).swapaxes(0, 1)
        best = facts.best[source, at]
        full = facts.best[self.index[FULL]]
        return Scored(facts.logprobs[source, at], best, best == full, depths)

    def _sources(self, one: Predictor, facts: Facts) -> tuple[np.ndarray, np.ndarray]:
        """For each position: the index of its predictor in `computed`, and the stages run: (T,)."""
        tested = one.tested or (one,)
        left = np.full(facts.best.shape[1], len(tested) - 1)
        for k in sorted(one.exits, reverse=True):
            left[facts.margins[self.index[tested[k].name]] > one.exits[k]] = k
        found = np.array([(self.index[p.name], p.target.depth + 1) for p in tested])[left]
        return found[:, 0], found[:, 1]

    def trace(self, one: Predictor, facts: Facts) -> Trace:
        """The trace that WAND's replay needs."""
        tested = [self.index[p.name] for p in one.tested[:-1]]
        hits = facts.best[tested] == facts.best[self.index[FULL]]
        margins = facts.margins[tested]
        return Trace(hits, margins, hits)
