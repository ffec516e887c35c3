"""A specialist's base in a conversion: the folder that a delta refers to, or heads summed up."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import mlx.core as mx

from cognica_mlx.config import SUMMED
from cognica_mlx.convert.checkpoint import Checkpoint, read_checkpoint
from cognica_mlx.convert.sources import Source
from cognica_mlx.errors import CheckpointError, RequestError
from cognica_mlx.files import lineage
from cognica_mlx.files.stored import StoredTensor

_HEAD = "lm_head.weight"


def read_converted_base(checkpoint: Checkpoint, base: Source) -> Checkpoint:
    """`base`, which is a conversion of the base under `checkpoint`; CheckpointError if not."""
    name, expected = checkpoint.source.name, checkpoint.base
    if expected is None:
        raise RequestError(f"{name} is itself a base: it has no other to refer to")
    converted = read_checkpoint(base)
    if converted.config.head_mode == SUMMED:
        raise RequestError(
            f"{base.name} is merged, with its heads summed: name its delta folder instead"
        )
    for field, value in expected.config.to_dict().items():
        other = converted.config.to_dict()[field]
        if value != other:
            raise CheckpointError(
                f"{base.name} is not the base of {name}: {field} is {other}, not {value}"
            )
    ours, theirs = (
        one.sketch() | {_HEAD: lineage.some(one.unpacked(_HEAD, mx.float32))}
        for one in (expected, converted)
    )
    if odd := lineage.difference(ours, theirs):
        raise CheckpointError(f"{base.name} is not the base of {name}: its {odd} differs")
    return converted


def with_summed_heads(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """The weights, with each specialist's head replaced by the sum of all heads up to it."""
    weights = dict(checkpoint.weights)
    heads = [weights[_HEAD]]
    for i in range(len(checkpoint.config.specialist_layers)):
        name = f"lm_head_specialists.{i}.weight"
        heads.append(weights[name])
        rows = min(head.shape[0] for head in heads)
        shape = (rows, checkpoint.config.n_embd)
        weights[name] = StoredTensor(shape, mx.float32, partial(_sum, tuple(heads), rows))
    return weights


def _sum(heads: Sequence[StoredTensor], rows: int) -> mx.array:
    total = mx.zeros((rows, heads[0].shape[1]), mx.float32)
    for head in heads:
        total = total + head.read()[:rows].astype(mx.float32)
        mx.eval(total)
    return total
