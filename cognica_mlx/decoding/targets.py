"""Predictors to decode with: the full stack, one stage, the first stages, or a mixture of stages.

A target names the stage boundaries that it reads and turns their activations into scores.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from cognica_mlx.cache.hidden import Hidden
from cognica_mlx.errors import RequestError
from cognica_mlx.network.model import PoEModel, log_op
from cognica_mlx.scheme import Scheme

# The heads that a specialist's drafts go through: see `draft_target`.
DRAFT_HEADS = ("summed", "base")


@dataclass(frozen=True)
class Target:
    """A predictor: `scores` maps the activations (1, T, D) at `boundaries` to (1, T, V) float32.

    Targets with the same `key` are equal, and their predictions can be computed together. The
    others give a prediction's cost: `heads` are the stages whose heads are read, and `scheme` says
    how they are quantized, if they are.
    """

    key: tuple[Hashable, ...]
    boundaries: tuple[int, ...] = field(compare=False)
    scores: Callable[[Mapping[int, Hidden]], mx.array] = field(compare=False)
    heads: tuple[int, ...] = field(compare=False)
    scheme: Scheme | None = field(default=None, compare=False)

    @property
    def depth(self) -> int:
        """The deepest stage it reads."""
        return max(self.boundaries)


def _head_ids(model: PoEModel, stages: Sequence[int]) -> tuple[Any, ...]:
    """A key that is equal in two models whose stages predict alike: positions and heads."""
    base = len(model.config.stage_layers)
    return tuple((k, k >= base, *map(id, model.heads(k))) for k in stages)


def full_target(model: PoEModel) -> Target:
    """The full model's own prediction."""
    stages = model.full_boundaries
    key = ("full", *_head_ids(model, stages))
    if len(stages) > 1:
        key = ("full", id(model))
    return Target(key, stages, model.full_scores, stages)


def stage_target(model: PoEModel, stage: int) -> Target:
    """One stage boundary's prediction."""
    model.check_stage(stage)
    key = ("stages", *_head_ids(model, [stage]))
    return Target(key, (stage,), lambda hidden: model.stage_logits(stage, hidden[stage]), (stage,))


def prefix_target(model: PoEModel, max_stages: int) -> Target:
    """The first `max_stages` stages: their Log-OP if each has its own head, else the last one."""
    if not 1 <= max_stages <= model.poe_n_stages:
        raise RequestError(f"max_stages {max_stages}: this model has 1 to {model.poe_n_stages}")
    if not model.pools_stages:
        return stage_target(model, max_stages - 1)
    stages = tuple(range(max_stages))
    return Target(
        ("prefix", id(model), max_stages),
        stages,
        lambda hidden: model.pool([model.stage_logits(k, hidden[k]) for k in stages]),
        stages,
    )


def draft_target(model: PoEModel, stage: int, draft_head: str) -> Target:
    """The drafter's target at `stage`. With `draft_head` "base" it is the stage's own prediction;
    with "summed", a specialist puts the base stage's activations through all heads of its final
    prediction.
    """
    if draft_head not in DRAFT_HEADS:
        raise RequestError(f"draft_head {draft_head!r} is not one of {', '.join(DRAFT_HEADS)}")
    in_base = stage < len(model.config.stage_layers)
    if draft_head == "summed" and in_base and model.config.specialist_layers:
        return Target(
            ("draft", id(model), stage),
            (stage,),
            lambda hidden: model.draft_logits(stage, hidden[stage]),
            model.full_boundaries,
        )
    return prefix_target(model, stage + 1)


def composed_target(
    model: PoEModel, stages: Sequence[int], weights: Sequence[float] | None = None
) -> Target:
    """A weighted Log-OP of any stages; weights are equal by default and scaled to add up to one.

    A weight may be negative, which moves the mixture away from that stage.
    """
    if not stages:
        raise RequestError("stages: name at least one stage to compose")
    for stage in stages:
        model.check_stage(stage)
    if len(set(stages)) < len(stages):
        raise RequestError(f"stages {list(stages)} names a stage twice")
    given = list(weights) if weights is not None else [1.0] * len(stages)
    if len(given) != len(stages):
        raise RequestError(f"stage_weights: {len(given)} weights for {len(stages)} stages")
    total = sum(given)
    if not 0 < total < float("inf"):
        raise RequestError(f"stage_weights {given} must add up to more than 0")
    shares = [weight / total for weight in given]
    return Target(
        ("compose", id(model), tuple(stages), tuple(shares)),
        tuple(stages),
        lambda hidden: log_op([model.stage_logits(k, hidden[k]) for k in stages], shares),
        tuple(stages),
    )
