"""A rounded copy of a model's first stages and heads: what the rounded drafter runs.

- a base drafts through its first stages, rounded
- a specialist through a *shallow* copy of itself: the base's first stages, then the specialist's
  own, fed by them as if the base ended there, and the heads of the full prediction
- both look at the keys and values that the model itself has made of the text, so they hold none of
  their own and never read a prompt: see `DecodingState.aside`
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn

from cognica_mlx.decoding.targets import Target, draft_target
from cognica_mlx.errors import RequestError
from cognica_mlx.model import PoEModel
from cognica_mlx.rounding import Scheme, copies_of, own_arrays, rounded_stage
from cognica_mlx.stages import Stage


@dataclass(frozen=True, eq=False)
class RoundedPrefix:
    """Stages that stand for the model's stages `of`, what is predicted from them, and the heads
    that this reads, beside those of the model."""

    model: PoEModel
    stages: tuple[Stage, ...]
    of: tuple[int, ...]
    target: Target
    heads: tuple[nn.Module, ...]
    originals: tuple[nn.Module, ...]

    @cached_property
    def arrays(self) -> list[mx.array]:
        """What it holds beyond the model: packed matrices, and their scales."""
        blocks = [block for stage in self.stages for block in stage.blocks]
        own = [block for k in self.of for block in self.model.stages[k].blocks]
        return own_arrays([*blocks, *self.heads], [*own, *self.originals])

    @property
    def nbytes(self) -> int:
        """Bytes of that."""
        return sum(array.nbytes for array in self.arrays)


def round_prefix(
    model: PoEModel, scheme: Scheme, draft_stage: int, draft_head: str
) -> RoundedPrefix:
    """The stages up to `draft_stage`, and a specialist's own, rounded: a shallow specialist unless
    it is to draft through the "base" head. Made once for a model; nothing is computed before it is
    used.

    Raises RequestError where rounding would change nothing, or a stage is on another machine.
    """
    for k in _copied(model, draft_stage, draft_head):
        if rank := model.stages[k].rank:
            raise RequestError(
                f"draft_bits: stage {k} is on rank {rank}, and only stages on rank 0 can be "
                "drafted from rounded; leave draft_bits out, or change the split"
            )
    made, key = copies_of(model), (scheme, draft_stage, draft_head)
    if key not in made:
        _take_up(model, scheme)
        made[key] = _round_prefix(model, scheme, draft_stage, draft_head)
    return made[key]


def _take_up(model: PoEModel, scheme: Scheme) -> None:
    """Let what is stored rounded beside the model, or beside its base, be the copy."""
    one: PoEModel | None = model
    while one is not None:
        if take_up := one.stored_copies.pop(scheme, None):
            take_up()
        one = one._base


def _round_prefix(
    model: PoEModel, scheme: Scheme, draft_stage: int, draft_head: str
) -> RoundedPrefix:
    copy = model.with_rounded_heads(scheme)
    trunk = len(model.config.stage_layers)
    of = _copied(model, draft_stage, draft_head)
    target = draft_target(copy, draft_stage, draft_head)
    heads = target.heads
    if len(of) > draft_stage + 1:
        boundaries = tuple(range(draft_stage + 1, len(of)))
        target = Target(
            ("shallow", id(copy), draft_stage),
            boundaries,
            lambda hidden: copy.shallow_scores([hidden[k] for k in boundaries]),
            heads,
        )
    stages = tuple(
        rounded_stage(stage, scheme, _source(stage.source, draft_stage, trunk))
        for stage in (model.stages[k] for k in of)
    )
    made = RoundedPrefix(
        model,
        stages,
        of,
        replace(target, key=(*target.key, scheme), scheme=scheme),
        tuple(head for k in heads for head in copy.heads(k)),
        tuple(head for k in heads for head in model.heads(k)),
    )
    if not made.arrays:
        raise RequestError(
            f"draft_bits: no matrix of stage {draft_stage} or its heads has more than "
            f"{scheme.bits} bits and rows that fit; leave draft_bits out"
        )
    return made


def _copied(model: PoEModel, draft_stage: int, draft_head: str) -> tuple[int, ...]:
    """The stages that a copy is made of."""
    trunk = len(model.config.stage_layers)
    shallow = draft_head == "summed" and draft_stage < trunk
    return (*range(draft_stage + 1), *(range(trunk, model.poe_n_stages) if shallow else ()))


def _source(source: int, draft_stage: int, trunk: int) -> int:
    """Where a stage takes in what it runs on, if the base ends after `draft_stage`."""
    return source if source <= draft_stage else source - trunk + draft_stage + 1
