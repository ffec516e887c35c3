"""Recorded answers: what known models should predict on a fixed text, on any machine.

- four models: two are built in; the weights of the other two come from a formula and take no space:
  one with a head per stage and grouped queries, and a specialist on a specialist
- the answers are from a numpy implementation of the architecture (tests/record_answers.py), not
  from the code that they check
- recorded for each predictor: the best token at every position, and at every `EVERY`-th position a
  few logits, the largest logit and the log of the sum of exponentials
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from cognica_mlx.config import PoEConfig
from cognica_mlx.convert.quantization import fill, make_plan, scheme
from cognica_mlx.files.stored import DTYPES
from cognica_mlx.network.device import lay_out, prepare
from cognica_mlx.network.model import PoEModel
from mlx_poe.loading.load import load

ANSWERS = Path(__file__).parent / "answers.safetensors"
EVERY = 16
COLUMNS = 8
BITS = 4

BUILT_IN = ("poe-tiny", "poe-tiny-chat")
_COMMON = {
    **{"n_head": 4, "n_embd": 64, "head_dim": 16, "vocab_size": 320, "sequence_len": 512},
    "window_pattern": "SSSL",
}
# Configurations as in checkpoints.
FORMULAS = {
    "own heads": {
        **_COMMON,
        **{"n_layer": 5, "n_kv_head": 2, "stage_layers": [2, 1, 1, 1], "per_stage_head": True},
    },
    "a chain of specialists": {
        **_COMMON,
        **{"n_layer": 6, "stage_layers": [2, 2], "specialist_layers": [1, 1]},
    },
}
MODELS = (*BUILT_IN, *FORMULAS)
# Roughly the lambdas of trained models.
_MEANS = {"resid_lambdas": 1.0, "x0_lambdas": 0.25, "smear_lambda": 0.5, "backout_lambda": 0.25}


@dataclass(frozen=True)
class Recording:
    """What a model should predict: tokens (T,), numbers (P, N, COLUMNS + 2) at every `EVERY`-th
    position, best (P, T), for the base's stages and, last, the full model."""

    tokens: np.ndarray
    numbers: np.ndarray
    best: np.ndarray


def read_recording(name: str, bits: int | None = None) -> Recording:
    """The answers of one of `MODELS`, with all matrices quantized to `bits` if given."""
    answers = mx.load(str(ANSWERS))
    assert isinstance(answers, dict)
    kind = f"{name}.{bits} bits" if bits else name
    parts = (f"{name}.tokens", f"{kind}.numbers", f"{kind}.best")
    tokens, numbers, best = (np.array(answers[part]) for part in parts)
    return Recording(tokens.astype(np.int32), numbers, best)


def recorded_model(name: str, dtype: str, bits: int | None = None) -> PoEModel:
    """One of `MODELS`, built by the code that loads any model."""
    if name in BUILT_IN:
        return load(name, dtype=dtype, quantize=bits)[0]
    config = PoEConfig.from_dict(FORMULAS[name])
    model, kind = PoEModel(config), DTYPES[dtype]
    shapes: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    arrays = ((n, formula(n, p.shape)) for n, p in shapes.items())
    prepare(kind)
    fill(model, arrays, make_plan(config, scheme(bits)) if bits else {}, kind)
    lay_out(model)
    return model


def formula(name: str, shape: tuple[int, ...]) -> mx.array:
    """The weights of that name: float32 (shape), exact in bfloat16, the same on every machine.

    Bits are mixed as in Wellons' "lowbias32". Matrices have rows of about unit length.
    """
    count = int(np.prod(shape))
    x = np.arange(count, dtype=np.uint32) + np.uint32(1 + sum(map(ord, name)) * 1_000_003 % 2**31)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    drawn = ((x ^ (x >> np.uint32(16))) >> np.uint32(25)).astype(np.float32) / 64 - 1
    if name in _MEANS:
        values = _MEANS[name] + drawn / 16
    else:
        values = drawn * 2.0 ** np.round(np.log2(np.sqrt(3 / shape[-1])))
    return mx.array(values.reshape(shape).astype(np.float32))


def condensed(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From scores (P, T, V): numbers and best as in `Recording`."""
    size = scores.shape[-1]
    top = scores.max(axis=-1, keepdims=True)
    total = top + np.log(np.exp(scores - top).sum(axis=-1, keepdims=True))
    picked = scores[..., [i * size // COLUMNS for i in range(COLUMNS)]]
    numbers = np.concatenate([picked, top, total], axis=-1)
    return numbers[:, EVERY - 1 :: EVERY].astype(np.float32), scores.argmax(axis=-1)


def difference(model: PoEModel, recording: Recording) -> tuple[float, float]:
    """The largest difference between the model's logits and the recorded ones, and the share of
    positions with the same best token. The difference is NaN if a logit is."""
    stages = model.predictions(mx.array(recording.tokens[None]))
    base = range(len(model.config.stage_layers))
    scores = np.stack([np.array(stages[k][0]) for k in (*base, len(stages) - 1)])
    numbers, best = condensed(scores)
    apart = np.abs(numbers - recording.numbers).max()
    return float(apart), float((best == recording.best).mean())
