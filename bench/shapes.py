"""The released models' shapes, and models with random weights in them: no download needed."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from cognica_mlx.config import PoEConfig
from cognica_mlx.convert.quantization import fill, make_plan, scheme
from cognica_mlx.machines.placement import Part
from cognica_mlx.network.model import PoEModel

_COMMON: dict[str, Any] = {"head_dim": 128, "sequence_len": 2048, "window_pattern": "SSSL"}
_1_3B = {
    **_COMMON,
    **{"n_layer": 24, "n_head": 12, "n_embd": 1536, "vocab_size": 32768},
    "poe_every": 6,
}

# Configurations as in the checkpoints; a specialist's includes its base.
SHAPES: dict[str, dict[str, Any]] = {
    "1.3b": _1_3B,
    "1.3b-stage": {
        **{name: value for name, value in _1_3B.items() if name != "poe_every"},
        **{"n_layer": 28, "stage_layers": [6, 6, 6, 6], "specialist_layers": [4]},
    },
    "1.5b": {
        **_COMMON,
        **{"n_layer": 24, "n_head": 12, "n_kv_head": 6, "n_embd": 1536, "vocab_size": 48000},
        **{"stage_layers": [12, 5, 4, 3], "per_stage_head": True},
    },
    "3b": {
        **_COMMON,
        **{"n_layer": 32, "n_head": 16, "n_kv_head": 8, "n_embd": 2048, "vocab_size": 32768},
        **{"stage_layers": [16, 6, 5, 5], "per_stage_head": True, "intermediate_size": 12800},
    },
    "tiny": {
        **{"n_layer": 8, "n_head": 2, "n_embd": 128, "vocab_size": 2048, "sequence_len": 512},
        **{"window_pattern": "SSSL", "poe_every": 2},
    },
}


def shape_config(shape: str) -> PoEConfig:
    """The configuration of one of `SHAPES`."""
    return PoEConfig.from_dict(SHAPES[shape])


def random_model(
    config: PoEConfig, dtype: mx.Dtype, seed: int = 0, part: Part | None = None
) -> PoEModel:
    """A model of this shape with small random weights of `dtype`, drawn from `seed`, or a `part` of
    it."""
    model = PoEModel(config)
    weights = random_weights(model, dtype, seed, part)  # those that the whole would have
    if part:
        part.strip(model)
    model.update(weights)
    model.eval()
    return model


def random_weights(
    module: nn.Module, dtype: mx.Dtype, seed: int = 0, part: Part | None = None
) -> dict[str, Any]:
    """Small random matrices for a module, or for a `part` of it; its vectors as they are."""
    weights: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    keys = mx.random.split(mx.random.key(seed), 10_000)
    for key, (name, parameter) in zip(keys, list(weights.items()), strict=False):
        if part and not part.holds(name):
            del weights[name]
        elif parameter.ndim < 2:  # norms and lambdas: as in a plain transformer
            weights[name] = parameter.astype(dtype)
        else:
            # Rows of unit length times a small factor, so that nothing grows with depth.
            bound = (3 / parameter.shape[-1]) ** 0.5
            weights[name] = mx.random.uniform(-bound, bound, parameter.shape, dtype, key)
            mx.eval(weights[name])
    made: dict[str, Any] = tree_unflatten(list(weights.items()))
    return made


def rounded(model: PoEModel, bits: int) -> PoEModel:
    """The same model with its matrices rounded to `bits` bits, as by `load(quantize=)`."""
    config = model.config
    plan, other = make_plan(config, scheme(bits)), PoEModel(config)
    given: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    fill(other, iter(given.items()), plan)
    return other
