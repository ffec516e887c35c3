"""What a token may be predicted from: the full stack, one stage, the first stages, any mixture.

A target says which stage boundaries it reads and turns their activations into scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from cognica_mlx.errors import RequestError
from cognica_mlx.model import Hidden, PoEModel, log_op

# How a specialist's drafts are made.
DRAFT_HEADS = ("summed", "base")


@dataclass(frozen=True)
class Target:
    """A predictor: `scores` maps the activations (1, T, D) at `boundaries` to (1, T, V) float32."""

    boundaries: tuple[int, ...]
    scores: Callable[[Mapping[int, Hidden]], mx.array]

    @property
    def depth(self) -> int:
        """The deepest stage it reads."""
        return max(self.boundaries)


def full_target(model: PoEModel) -> Target:
    """The full model's own prediction."""
    return Target(model.full_boundaries, model.full_scores)


def stage_target(model: PoEModel, stage: int) -> Target:
    """One stage boundary's prediction."""
    model.check_stage(stage)
    return Target((stage,), lambda hidden: model.stage_logits(stage, hidden[stage]))


def prefix_target(model: PoEModel, max_stages: int) -> Target:
    """The first `max_stages` stages: their Log-OP where each has its own head, else the last's."""
    if not 1 <= max_stages <= model.poe_n_stages:
        raise RequestError(f"max_stages {max_stages}: this model has 1 to {model.poe_n_stages}")
    if not model.pools_stages:
        return stage_target(model, max_stages - 1)
    stages = tuple(range(max_stages))
    return Target(
        stages, lambda hidden: model.pool([model.stage_logits(k, hidden[k]) for k in stages])
    )


def draft_target(
    model: PoEModel,
    stage: int,
    draft_head: str,
    draft_vocab: int | None = None,
    draft_rank: int | None = None,
) -> Target:
    """What drafts at `stage`: its own prediction with "base"; with "summed", where a specialist
    stands on the base, the base stage's activations through all the heads that are summed.

    With `draft_vocab` only the first so many token ids are scored, which reads as many rows of the
    heads; in a byte-pair vocabulary those are the most frequent ones. With `draft_rank` the head is
    read along so many directions: see `ShortlistHead`.
    """
    if draft_head not in DRAFT_HEADS:
        raise RequestError(f"draft_head {draft_head!r} is none of {', '.join(DRAFT_HEADS)}")
    size = model.config.vocab_size
    if draft_rank is not None:
        if draft_vocab is not None:
            raise RequestError("draft_vocab and draft_rank: give one of them")
        model = model.with_shortlist(draft_rank)
    if draft_vocab is not None:
        if not 1 <= draft_vocab <= size:
            raise RequestError(f"draft_vocab {draft_vocab} is not between 1 and {size}")
        model = model.with_short_heads(draft_vocab)
    target = prefix_target(model, stage + 1)
    in_base = stage < len(model.config.stage_layers)
    if draft_head == "summed" and in_base and model.config.specialist_layers:
        target = Target((stage,), lambda hidden: model.draft_logits(stage, hidden[stage]))
    if draft_vocab is None:
        return target
    missing = [(0, 0), (0, 0), (0, size - draft_vocab)]
    return Target(
        target.boundaries,
        lambda hidden: mx.pad(target.scores(hidden), missing, constant_values=-mx.inf),
    )


def composed_target(
    model: PoEModel, stages: Sequence[int], weights: Sequence[float] | None = None
) -> Target:
    """A weighted Log-OP of any stages; equal weights unless given, scaled to add up to one.

    A weight may be negative (the mixture then moves away from that stage).
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
        tuple(stages),
        lambda hidden: log_op([model.stage_logits(k, hidden[k]) for k in stages], shares),
    )
