"""Tells the model that a stage was trained on from another of the same shape, by its weights.

- in: a configuration, and how to read a weight: on disk or in memory, quantized or not
- out: a sketch: a few values of a few weights, which quantization hardly changes and training does
- a delta's config.json records the sketch of what is below it; a calibration and a copy to draft
  with that of their model; older files lack it
- embeddings and heads are left out: they are large, and files pad them differently
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from cognica_mlx.config import PoEConfig
from cognica_mlx.errors import CheckpointError
from cognica_mlx.scheme import unpacked

FIELD = "trained_on"
# Trained, small and never packed.
SMALL = ("smear_lambda", "backout_lambda", "smear_gate.weight", "resid_lambdas", "x0_lambdas")
_VALUES, _ROWS = 64, 64
# The share of a weight's largest value that its values may be off by: in at least 16 bits, packed.
_CAST, _PACKED = 0.01, 0.5
_LEAST = 1e-7  # float16 rounds smaller values to 0

Sketch = dict[str, np.ndarray]


def sketch(config: PoEConfig, read: Callable[[str], mx.array | None]) -> Sketch:
    """Some values of a model's weights. `read` returns a weight by name, dequantized, or None if it
    is not here."""
    starts = np.cumsum([config.base_n_layer, *config.specialist_layers])[:-1]
    # A block's output matrices start at zero, so what they hold is what was learned.
    matrices = ("h.0.attn.c_q.weight", *(f"h.{i}.mlp.c_proj.weight" for i in starts))
    found = {name: read(name) for name in (*SMALL, *matrices)}
    return {name: some(array) for name, array in found.items() if array is not None}


def of_model(model: nn.Module) -> Sketch:
    """The sketch of a `PoEModel` in memory, without the weights that another machine holds."""
    modules = dict(model.named_modules())

    def read(name: str) -> mx.array | None:
        path, _, leaf = name.rpartition(".")
        module = modules.get(path, {})
        if leaf not in module:
            return None
        return unpacked(module) if leaf == "weight" else module[leaf]

    return sketch(model.config, read)


def some(array: mx.array) -> np.ndarray:
    """A few values from all over a weight's first rows, which padding does not change."""
    flat = array[:_ROWS].reshape(-1)
    return np.array(flat[:: flat.size // _VALUES + 1].astype(mx.float32))


def difference(one: Sketch, other: Sketch) -> str | None:
    """The first weight in both sketches whose values differ by more than quantization explains."""
    for name in one:
        if name in other:
            ours, theirs = one[name], other[name]
            allowed = (_CAST if name in SMALL else _PACKED) * np.abs(ours).max(initial=0) + _LEAST
            # A value that is not finite equals none.
            if ours.shape != theirs.shape or not np.abs(ours - theirs).max() <= allowed:
                return name
    return None


def record(of: Sketch) -> dict[str, str]:
    """A sketch as JSON."""
    return {name: b64encode(values.astype("<f4").tobytes()).decode() for name, values in of.items()}


def recorded(fields: Mapping[str, Any], name: str = FIELD) -> Sketch:
    """The sketch recorded in a field; empty if there is none.

    Raises CheckpointError if it is damaged.
    """
    try:
        entries = fields.get(name, {}).items()
        return {str(k): np.frombuffer(b64decode(v, validate=True), "<f4") for k, v in entries}
    except (AttributeError, TypeError, ValueError):
        raise CheckpointError(f"its {name} is damaged: download it again") from None
