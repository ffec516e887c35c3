"""Write the answers that mlx_poe.doctor compares with: python tests/record_answers.py

They come from the oracle in reference.py, in float32 numpy, and from nothing else.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from random_checkpoint import released_name
from reference import Reference

from cognica_mlx.network.model import PoEModel
from mlx_poe import load
from mlx_poe.doctor.recorded import ANSWERS, BITS, BUILT_IN, MODELS, condensed, recorded_model
from mlx_poe.loading.verify import SAMPLE

TOKENS = 176  # more than the short windows


def text(name: str, vocab_size: int) -> np.ndarray:
    """What a model is asked: English for those who know it, else anything."""
    if name in BUILT_IN:
        return np.array(load(name)[1].encode(SAMPLE)[:TOKENS], np.int32)
    return np.arange(TOKENS, dtype=np.int32) * 7919 % vocab_size


def oracle(model: PoEModel) -> Reference:
    """The same model in numpy, from the weights that it holds, rounded or not."""
    weights = {}
    for path, module in model.named_modules():
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            parts = (module.weight, module.scales, module.biases)
            whole = mx.dequantize(*parts, module.group_size, module.bits)
            weights[f"{path}.weight"] = whole
    for name, array in tree_flatten(model.parameters()):
        if name.rpartition(".")[0] + ".weight" not in weights:
            weights[name] = array
    found = {released_name(n): np.array(a.astype(mx.float32)) for n, a in weights.items()}
    config = model.config
    heads = [
        found.pop(f"lm_head_specialists.{i}.weight") for i in range(len(config.specialist_layers))
    ]
    fields = {**config.to_dict(), "n_layer": config.base_n_layer}
    fields["poe_stage_layers"] = list(config.stage_layers)
    return Reference(fields, found, heads, config.n_layer)


def answers(name: str, bits: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, numbers and best of one model."""
    model = recorded_model(name, "float32", bits)
    tokens = text(name, model.config.vocab_size)
    found = oracle(model).predictions(tokens)
    stages = range(len(model.config.stage_layers))
    scores = np.stack([*(found[f"stage_{k}"] for k in stages), found["full"]])
    return tokens, *condensed(scores)


def main() -> None:
    """Write the file."""
    arrays = {}
    for name in MODELS:
        for bits in (None, BITS):
            tokens, numbers, best = answers(name, bits)
            kind = f"{name}.{bits} bits" if bits else name
            arrays[f"{name}.tokens"] = mx.array(tokens.astype(np.uint16))
            arrays[f"{kind}.numbers"] = mx.array(numbers)
            arrays[f"{kind}.best"] = mx.array(best.astype(np.uint16))
    mx.save_safetensors(str(ANSWERS), arrays)


if __name__ == "__main__":
    main()
