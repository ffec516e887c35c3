"""The model for mlx-lm's commands: `mlx_lm.generate`, `mlx_lm.perplexity`, `mlx_lm.server`.

- in: a converted model folder; with `--trust-remote-code`, its `model_file` points mlx-lm here
- full depth only: stages, WAND and self-speculation need this package's own commands
- it uses mlx-lm's caches, so that its server can merge, split, extend and store them
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, RotatingKVCache

from cognica_mlx.cache.hidden import Hidden
from cognica_mlx.config import PoEConfig
from cognica_mlx.errors import CheckpointError
from cognica_mlx.network.model import PoEModel
from cognica_mlx.network.quantized_copies import is_finite

ModelArgs = PoEConfig


class RotatingCache:
    """A layer's mlx-lm cache, for one sequence or a batch, with the interface our blocks expect."""

    def __init__(self, cache: Any, length: int):
        self._cache = cache
        self.offset: int | mx.array = cache.offset
        self._mask = cache.make_mask(length)

    def attend(self, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        """Add keys and values (B, KV, T, head_dim); attention of queries (B, H, T, head_dim)."""
        k, v = self._cache.update_and_fetch(k, v)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=self._mask)


class Model(PoEModel):
    """A Cognica-PoE model with the call and the caches that mlx-lm expects."""

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The weights as mlx-lm has read them. CheckpointError if one holds NaN or infinity."""
        for name, array in weights.items():
            if not is_finite(name, array):
                raise CheckpointError(f"{name} holds NaN or infinity: convert the model again")
        return weights

    @property
    def layers(self) -> list[Any]:
        """The blocks, under mlx-lm's name for them."""
        return self.h

    def make_cache(self) -> list[Any]:
        """The smear's state, then one bounded key-value cache for each layer."""
        # A window of w shows w + 1 keys.
        layers = [RotatingKVCache(max_size=window + 1, keep=0) for window in self.config.windows]
        return [ArraysCache(size=1), *layers]

    def __call__(self, tokens: mx.array, cache: Sequence[Any] | None = None) -> mx.array:
        """Full-depth logits (flat) or Log-OP scores of tokens (B, T): (B, T, V) float32.

        `cache`, from `make_cache` or merged from several by mlx-lm, holds the earlier positions and
        is extended by these.
        """
        if cache is None:
            return super().__call__(tokens)
        hidden, boundaries = self._embed_after(tokens, cache[0]), {}
        layers = cache[1:]
        for k, stage in enumerate(self.stages):
            caches = [RotatingCache(layers[i], tokens.shape[1]) for i in stage.layers]
            boundaries[k] = hidden = stage(hidden, caches)
        return self.full_scores(boundaries)

    def _embed_after(self, tokens: mx.array, state: ArraysCache) -> Hidden:
        """Embed and smear tokens (B, T); `state` keeps each row's last embedding (B, 1, D).

        At the start of a text it is zeros, which smear nothing into the first position; mlx-lm
        fills rows that join a batch with zeros too.
        """
        length = tokens.shape[1]
        x = self.embeddings(tokens)
        padding_mask = state.make_mask(length)
        if padding_mask is not None:
            x = mx.where(padding_mask[..., None], x, 0)
        before = mx.zeros_like(x[:, :1]) if state[0] is None else state[0]
        x = mx.concatenate([before, x], axis=1)
        if state.lengths is None:
            # Contiguous: a view would keep the whole prompt's embeddings alive.
            state[0] = mx.contiguous(x[:, -1:])
        else:
            ends = mx.clip(state.lengths, 0, length)
            state[0] = mx.take_along_axis(x, ends[:, None, None], axis=1)
        state.advance(length)
        smeared = self.smear(x)
        return Hidden(tokens, smeared, smeared)
