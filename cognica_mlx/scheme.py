"""How a matrix is quantized, and back: bits, group size and mode, as `mx.quantize` takes them."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from cognica_mlx.errors import RequestError

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
# The modes of mx.quantize with their default group size and bits; only affine has other choices.
MODES = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
# The choices for a drafter.
DRAFT_BITS = (*map(str, BITS), "mxfp4", "nvfp4")

SUFFIXES = ("weight", "scales", "biases")


@dataclass(frozen=True)
class Scheme:
    """How a matrix is quantized: `bits` per weight, groups of `group_size` along a row, `mode`."""

    bits: int
    group_size: int
    mode: str = "affine"

    def fits(self, width: int) -> bool:
        """Whether rows of this length can be packed, and unpacked: in "nvfp4" MLX unpacks only
        rows of an even number of groups."""
        return width % max(self.group_size, min(GROUP_SIZES)) == 0

    def quantize(self, matrix: mx.array) -> dict[str, mx.array]:
        """`matrix` (rows, columns) as a module's packed "weight", "scales" and perhaps "biases"."""
        parts = mx.quantize(matrix, self.group_size, self.bits, mode=self.mode)
        return dict(zip(SUFFIXES, parts, strict=False))


def draft_scheme(bits: int | str) -> Scheme:
    """A drafter's scheme: a number of bits in groups of 64, or "mxfp4" or "nvfp4".

    Raises RequestError for anything else.
    """
    name = str(bits)
    if isinstance(bits, bool) or name not in DRAFT_BITS:
        raise RequestError(f"draft_bits {bits!r}: choose from {', '.join(DRAFT_BITS)}")
    if name in MODES:
        group_size, count = MODES[name]
        return Scheme(count, group_size, name)
    return Scheme(int(name), MODES["affine"][0])


def unpacked(module: nn.Module) -> mx.array:
    """The weights (rows, columns) of a layer or an embedding table in float32, dequantized if need
    be."""
    weight: mx.array = module.weight
    if hasattr(module, "scales"):
        weight = mx.dequantize(
            weight, module.scales, module.get("biases"), module.group_size, module.bits, module.mode
        )
    return weight.astype(mx.float32)
