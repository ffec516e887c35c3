"""Quantized copies of matrices, stages and heads to draft with, which have fewer bytes to read.

- every copy is made once and kept with its original, so that all specialists over one base draft
  from the same copies
- the model itself does not change; `quantized_matrices` lists what the copies add in memory
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from cognica_mlx.backend.traces import Traces
from cognica_mlx.network.stages import Block, Stage
from cognica_mlx.scheme import GROUP_SIZES, Scheme

# The bits of infinity, and the integers with and without sign of the same size.
_INFINITY = {
    mx.float32: (0x7F800000, mx.int32, mx.uint32),
    mx.bfloat16: (0x7F80, mx.int16, mx.uint16),
    mx.float16: (0x7C00, mx.int16, mx.uint16),
}


def is_finite(name: str, array: mx.array, mode: str = "affine") -> bool:
    """Whether a parameter has no NaN and no infinity. Reads it twice and copies nothing.

    `mode` is how its module is packed: some keep scales or weights as one-byte floats.
    """
    suffix = name.rpartition(".")[2]
    if array.dtype in _INFINITY and array.size:
        # As integers, because numbers of one sign are in the same order as their bits.
        infinity, signed, unsigned = _INFINITY[array.dtype]
        above, below = mx.max(array.view(signed)), mx.max(array.view(unsigned))
        negative = 1 << (8 * array.dtype.size - 1)
        return bool((above < infinity) & (below < (infinity | negative)))
    if mode.startswith("mx") and suffix == "scales":
        # E8M0: 0xFF is NaN, and 0xFE is 2^127, which any weight but 1 takes out of range.
        return bool(mx.max(array) < 0xFE)
    if (mode, suffix) in (("nvfp4", "scales"), ("mxfp8", "weight")):
        return not mx.any((array.view(mx.uint8) & 0x7F) == 0x7F).item()  # E4M3's NaN, either sign
    return True


def quantized(module: nn.Module, scheme: Scheme) -> nn.Module:
    """A copy of a matrix quantized by `scheme`, made once. Returns the matrix itself if it has no
    more bits already, or if its rows are not a multiple of the group size.

    In affine mode, rows that are not a multiple of the scheme's group size get groups of 32.
    """
    kept: dict[Scheme, nn.Module] = copies_of(module)
    if scheme not in kept:
        kept[scheme] = _quantized(module, scheme)
    return kept[scheme]


def copies_of(thing: object) -> dict[Any, Any]:
    """The quantized copies made so far of a module, stage or model, which keeps them."""
    copies: dict[Any, Any] = thing.__dict__.setdefault("_copies", {})
    return copies


def _quantized(module: nn.Module, scheme: Scheme) -> nn.Module:
    matrix: nn.Linear
    if isinstance(module, nn.QuantizedLinear):
        if module.bits <= scheme.bits:
            return module
        ways = module.group_size, module.bits
        parts = (module.weight, module.scales, module.get("biases"), *ways)
        matrix = nn.Linear(1, 1, bias=False)
        matrix.weight = mx.dequantize(*parts, mode=module.mode)
    elif isinstance(module, nn.Linear):
        matrix = module
    else:
        return module
    width = matrix.weight.shape[-1]
    group_size = scheme.group_size
    if scheme.mode == "affine" and width % group_size:
        group_size = min(GROUP_SIZES)
    if not replace(scheme, group_size=group_size).fits(width):
        return module
    made: nn.Module = matrix.to_quantized(group_size, scheme.bits, mode=scheme.mode)
    return made


def quantized_stage(stage: Stage, scheme: Scheme, source: int) -> Stage:
    """A copy of a stage with quantized matrices that reads boundary `source`; made once. Embedding
    tables, which a token reads one row of, stay the model's own."""
    kept: dict[tuple[Scheme, int], Stage] = copies_of(stage)
    key = scheme, source
    if key not in kept:
        other = copy.copy(stage)
        other.__dict__.pop("_copies", None)
        other.traces = Traces()
        other.blocks = [_quantized_block(block, scheme) for block in stage.blocks]
        other.scheme, other.source = scheme, source
        kept[key] = other
    return kept[key]


def _quantized_block(block: Block, scheme: Scheme) -> Block:
    other = copy.copy(block)
    other.attn, other.mlp = copy.copy(block.attn), copy.copy(block.mlp)
    for part in (other.attn, other.mlp):
        for name, module in list(part.items()):
            if isinstance(module, (nn.Linear, nn.QuantizedLinear)):
                part[name] = quantized(module, scheme)
    restack(other)
    return other


def restack(block: Block) -> None:
    """Join a quantized block's query, key and value matrices anew, where that pays."""
    object.__setattr__(block.attn, "_qkv", None)
    if mx.default_device() == mx.gpu:
        block.attn.stack()


def quantized_matrices(
    copies: Sequence[nn.Module], originals: Sequence[nn.Module]
) -> list[tuple[nn.Module, nn.Module]]:
    """The matrices in `copies` that are quantized, each with its original."""
    pairs: list[tuple[nn.Module, nn.Module]] = []
    for one, other in zip(copies, originals, strict=True):
        theirs = dict(other.named_modules())
        pairs += [
            (matrix, theirs[name])
            for name, matrix in one.named_modules()
            if isinstance(matrix, nn.QuantizedLinear) and matrix is not theirs[name]
        ]
    return pairs


def release(matrix: nn.Module, original: nn.Module, scheme: Scheme) -> None:
    """Give a copy's memory back: it is quantized again when it is next used."""
    matrix.update(_quantized(original, scheme).parameters())
