"""A quantized copy of a model's first stages and heads, which drafting runs.

- a base drafts through its first stages, quantized
- a specialist drafts through a *shallow* copy of itself: the base's first stages, then the
  specialist's own, as if the base ended there, and the heads of the full prediction
- both use the keys and values that the model itself computed for the text, so they keep none of
  their own and never read a prompt: see `DecodingState.aside`
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn

from cognica_mlx.decoding.targets import Target, draft_target
from cognica_mlx.errors import RequestError
from cognica_mlx.network.model import PoEModel
from cognica_mlx.network.quantized_copies import (
    copies_of,
    quantized_matrices,
    quantized_stage,
    release,
    restack,
)
from cognica_mlx.network.stages import Stage
from cognica_mlx.scheme import Scheme


@dataclass(frozen=True, eq=False)
class QuantizedPrefix:
    """Stages that replace the model's stages `of`, the target that predicts from them, the heads
    that it reads, and the model's original heads."""

    model: PoEModel
    stages: tuple[Stage, ...]
    of: tuple[int, ...]
    target: Target
    heads: tuple[nn.Module, ...]
    originals: tuple[nn.Module, ...]

    @cached_property
    def _matrices(self) -> dict[int, tuple[nn.Module, nn.Module]]:
        """The quantized matrices, each once, with their originals."""
        blocks = [block for stage in self.stages for block in stage.blocks]
        own = [block for k in self.of for block in self.model.stages[k].blocks]
        pairs = quantized_matrices([*blocks, *self.heads], [*own, *self.originals])
        return {id(pair[0]): pair for pair in pairs}

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays that it holds in addition to the model's: packed matrices and their scales."""
        return [a for matrix, _ in self._matrices.values() for a in matrix.parameters().values()]

    @cached_property
    def sizes(self) -> dict[int, int]:
        """The bytes of each quantized matrix; a key stands for the same one in any other prefix."""
        return {
            key: sum(array.nbytes for array in matrix.parameters().values())
            for key, (matrix, _) in self._matrices.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all quantized matrices."""
        return sum(self.sizes.values())

    def release(self, but: Container[int] = ()) -> None:
        """Give back the memory of all matrices `but` these keys of `sizes`. What is used again is
        quantized again first."""
        assert self.target.scheme
        for key, (matrix, original) in self._matrices.items():
            if key not in but:
                release(matrix, original, self.target.scheme)
        for stage in self.stages:
            for block in stage.blocks:
                restack(block)
            stage.traces.clear()
        self.model.traces.clear()  # those of its scores


def quantize_prefix(
    model: PoEModel, scheme: Scheme, draft_stage: int, draft_head: str
) -> QuantizedPrefix:
    """The stages up to `draft_stage`, quantized; for a specialist also its own stage, unless
    `draft_head` is "base". Made once for a model; nothing is computed until it is used.

    Raises RequestError if quantizing would change nothing, or a stage is on another machine.
    """
    for k in _copied(model, draft_stage, draft_head):
        if rank := model.stages[k].rank:
            raise RequestError(
                f"draft_bits: stage {k} is on rank {rank}, and only stages on rank 0 can be "
                "drafted from quantized; leave draft_bits out, or change the split"
            )
    made: dict[tuple[Scheme, int, str], QuantizedPrefix] = copies_of(model)
    key = scheme, draft_stage, draft_head
    if key not in made:
        # Use the quantized copy that is stored beside the model or its base, if there is one.
        one: PoEModel | None = model
        while one is not None:
            if take_up := one.stored_copies.pop(scheme, None):
                take_up()
            one = one._base
        made[key] = _quantize_prefix(model, scheme, draft_stage, draft_head)
    return made[key]


def _quantize_prefix(
    model: PoEModel, scheme: Scheme, draft_stage: int, draft_head: str
) -> QuantizedPrefix:
    copy = model.with_quantized_heads(scheme)
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
        quantized_stage(stage, scheme, _source(stage.source, draft_stage, trunk))
        for stage in (model.stages[k] for k in of)
    )
    made = QuantizedPrefix(
        model,
        stages,
        of,
        replace(target, key=(*target.key, scheme), scheme=scheme),
        tuple(head for k in heads for head in copy.heads(k)),
        tuple(head for k in heads for head in model.heads(k)),
    )
    if not made.arrays:
        raise RequestError(
            f"draft_bits: stage {draft_stage} and its heads have no matrix that can be quantized "
            f"to {scheme.bits} bits; leave draft_bits out"
        )
    return made


def _copied(model: PoEModel, draft_stage: int, draft_head: str) -> tuple[int, ...]:
    """The stages to copy."""
    trunk = len(model.config.stage_layers)
    shallow = draft_head == "summed" and draft_stage < trunk
    return (*range(draft_stage + 1), *(range(trunk, model.poe_n_stages) if shallow else ()))


def _source(source: int, draft_stage: int, trunk: int) -> int:
    """The boundary that a stage reads if the base ends after `draft_stage`."""
    return source if source <= draft_stage else source - trunk + draft_stage + 1
