"""Blocks, and the stages that they make up.

- a stage maps activations at one boundary to those at the next, (B, T, D)
- every path (prefill, one token, a batch of drafts, a catch-up) runs through a `Stage`
- keys and values are the cache's job: `AttentionCache`
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from cognica_mlx.cache.attention import WholeText
from cognica_mlx.cache.hidden import Hidden
from cognica_mlx.cache.keys_and_values import AttentionCache, Done, KeysAndValues
from cognica_mlx.cache.packed_pass import arranged, begin
from cognica_mlx.cache.stage_cache import StageCache
from cognica_mlx.config import VALUE_GATE_CHANNELS, PoEConfig
from cognica_mlx.network.elementwise import gated, mixed, relu_squared
from cognica_mlx.network.linear import Linear, added

if TYPE_CHECKING:
    from cognica_mlx.network.model import PoEModel
    from cognica_mlx.scheme import Scheme

NORM_EPS = 1.1920929e-07
# Queries and keys are each scaled by this after their norm (nanochat's sharper attention).
QK_SCALE = 1.2


def norm(x: mx.array) -> mx.array:
    """RMSNorm over the last axis, without a learned weight."""
    return mx.fast.rms_norm(x, None, NORM_EPS)


class Attention(nn.Module):
    """Causal grouped-query attention over a sliding window."""

    def __init__(self, config: PoEConfig, layer: int):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.head_dim
        width, kv_width = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        self.c_q = Linear(config.n_embd, width, bias=False)
        self.c_k = Linear(config.n_embd, kv_width, bias=False)
        self.c_v = Linear(config.n_embd, kv_width, bias=False)
        self.c_proj = Linear(width, config.n_embd, bias=False)
        if layer in (config.value_embed_layers or ()):
            self.value_embed = nn.Embedding(config.padded_vocab_size, kv_width)
            self.ve_gate = Linear(VALUE_GATE_CHANNELS, self.n_kv_head, bias=False)
        # Negative, because rotation is by minus theta: mx.fast.rope divides positions by these.
        # Made by NumPy, so that the thread that generates has nothing to evaluate.
        halves = np.arange(0, self.head_dim, 2, dtype=np.float32) / self.head_dim
        self._freqs = mx.array(-(np.float32(config.rope_theta) ** halves))
        # Not a parameter, because it shares the arrays of c_q, c_k and c_v: `object.__setattr__`
        # hides it from nn.Module.
        object.__setattr__(self, "_qkv", None)
        # The factor 1.2 on queries and on keys is folded into attention's scale.
        self._scale = QK_SCALE**2 * self.head_dim**-0.5

    def stack(self) -> None:
        """Join the query, key and value matrices into one, and make them views of it.

        On a GPU one product replaces three and saves two copies; on the CPU three are faster.
        Matrices that are quantized differently stay separate.
        """
        parts = [self.c_q, self.c_k, self.c_v]
        first = parts[0]
        ways = ("group_size", "bits", "mode")
        if len({(type(part), *(getattr(part, way, None) for way in ways)) for part in parts}) > 1:
            return
        joined = copy.copy(first)
        names = list(first.parameters())
        for name in names:
            joined[name] = mx.concatenate([part[name] for part in parts])
        start = 0
        for part in parts:
            stop = start + part.weight.shape[0]
            for name in names:
                part[name] = joined[name][start:stop]
            start = stop
        object.__setattr__(self, "_qkv", joined)

    def _heads(self, x: mx.array) -> mx.array:
        """(B, T, H * head_dim) -> (B, H, T, head_dim)."""
        batch, length, _ = x.shape
        return x.reshape(batch, length, -1, self.head_dim).transpose(0, 2, 1, 3)

    def _rotate(self, x: mx.array, offset: int | mx.array) -> mx.array:
        """Rotary embedding of (B, T, H * head_dim) -> (B, H, T, head_dim).

        `offset` is the first position, or (B,) first positions, or for B = 1 (T,) each row's own.
        """
        batch, length, _ = x.shape
        by_row = batch == 1 and isinstance(offset, mx.array) and offset.size == length > 1
        heads = x.reshape(length, -1, 1, self.head_dim) if by_row else self._heads(x)
        heads = mx.fast.rope(
            heads,
            self.head_dim,
            traditional=False,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self._freqs,
        )
        return heads.transpose(2, 1, 0, 3) if by_row else heads

    def __call__(self, u: mx.array, tokens: mx.array, cache: AttentionCache) -> mx.array:
        width = self.n_head * self.head_dim
        kv_width = self.n_kv_head * self.head_dim
        if self._qkv is not None:
            joined = self._qkv(u)
            qk, v = joined[..., : width + kv_width], joined[..., width + kv_width :]
        else:
            qk, v = mx.concatenate([self.c_q(u), self.c_k(u)], axis=-1), self.c_v(u)
        # Queries and keys are rotated and normalized together: half as many kernels.
        qk = norm(self._rotate(qk, cache.offset))
        q, k = qk[:, : self.n_head], qk[:, self.n_head :]
        v = self._heads(v)
        if "value_embed" in self:
            gate = self.ve_gate(u[..., :VALUE_GATE_CHANNELS])  # (B, T, n_kv_head)
            # Tables in MLX's floating-point modes return bfloat16 whatever the model's dtype.
            embedded = self._heads(self.value_embed(tokens)).astype(v.dtype)
            v = gated(v, gate.transpose(0, 2, 1)[..., None], embedded)
        out = cache.attend(q, k, v, self._scale)
        return out.transpose(0, 2, 1, 3).reshape(u.shape[0], u.shape[1], -1)


class MLP(nn.Module):
    """Two matrices around a squared ReLU."""

    def __init__(self, config: PoEConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.intermediate_size, bias=False)
        self.c_proj = Linear(config.intermediate_size, config.n_embd, bias=False)

    def __call__(self, u: mx.array) -> mx.array:
        """The input of `c_proj`."""
        return relu_squared(self.c_fc(u))


class Block(nn.Module):
    """One layer: attention and MLP, each on the normalized residual stream."""

    def __init__(self, config: PoEConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, tokens: mx.array, cache: AttentionCache) -> mx.array:
        x = added(x, self.attn.c_proj, self.attn(norm(x), tokens, cache))
        return added(x, self.mlp.c_proj, self.mlp(norm(x)))


class Stage:
    """Consecutive blocks that run together, from one boundary to another; requests name a stage.

    `source` is the boundary that it reads: 0 is the embedded text, k + 1 the output of stage k.
    Models over one base share its stage objects, so that positions of all of them can go through a
    stage in one pass. A stage on another machine brings its own `new_cache`, `order`, `run` and
    `ask_logits`; `rank` is that machine, and `dispensable` says whether decoding goes on with the
    stages before it once the machine is lost.
    """

    rank = 0
    dispensable = False

    def __init__(self, model: PoEModel, layers: range, source: int):
        self.layers, self.source = layers, source
        self.blocks = [model.h[i] for i in layers]
        self.windows = model.config.windows[layers[0] : layers[-1] + 1]
        # How its matrices are quantized, in a copy to draft with: see `quantized_stage`.
        self.scheme: Scheme | None = None
        self._backout_layer = model.config.backout_layer
        self._model = model
        self._lambdas: list[tuple[mx.array, mx.array]] = []
        self._split_from: tuple[mx.array, ...] = ()

    def new_cache(self, slack: int) -> KeysAndValues:
        """An empty cache for one sequence's keys and values in this stage."""
        return StageCache(self.windows, slack)

    def order(self, caches: Sequence[Any], counts: Sequence[int]) -> list[int]:
        """The order in which caches of this stage share a pass of `counts` positions, which `run`
        must follow."""
        return arranged(caches, counts)

    def run(
        self, hidden: Hidden, caches: Sequence[Any], counts: Sequence[int]
    ) -> tuple[Hidden, Sequence[Done]]:
        """Run the next `counts` positions of each cache, which `hidden` holds one after the other.
        Returns the output, and what to commit to each cache; nothing has changed before that."""
        attention, done = begin(caches, counts)
        return self(hidden, [attention] * len(self.blocks)), done

    def ask_logits(self, hidden: Hidden, drafts: bool = False) -> Callable[[], mx.array] | None:
        """Ask the machine that holds the stage's heads for its prediction from `hidden`; returns a
        function that waits for it, (1, T, V) float32. None if the heads are here. With `drafts` the
        activations are a base stage's, without backout."""
        return None

    def lambdas(self) -> list[tuple[mx.array, mx.array]]:
        """Each layer's factors for the residual stream and the embedded text, (1,) each."""
        arrays = self._model.resid_lambdas, self._model.x0_lambdas
        if not same(self._split_from, arrays):
            self._lambdas = [(arrays[0][i : i + 1], arrays[1][i : i + 1]) for i in self.layers]
            mx.eval(self._lambdas)
            self._split_from = arrays
        return self._lambdas

    def __call__(self, hidden: Hidden, caches: Sequence[AttentionCache] | None = None) -> Hidden:
        """Run positions (B, T) through the blocks.

        `caches`, one for each block, hold the keys and values of earlier positions; without them
        these positions start the text.
        """
        tokens, x, x0, backout = hidden.tokens, hidden.x, hidden.x0, hidden.backout
        if caches is None:
            whole = {w: WholeText(w, len(hidden)) for w in set(self.windows)}
            caches = [whole[w] for w in self.windows]
        parts = zip(self.layers, self.blocks, self.lambdas(), caches, strict=True)
        for i, block, (keep, again), attention in parts:
            x = block(mixed(keep, x, again, x0), tokens, attention)
            if i == self._backout_layer:
                backout = x
        return Hidden(tokens, x, x0, backout)


def same(a: Sequence[object], b: Sequence[object]) -> bool:
    """Whether two sequences are of the same objects."""
    return list(map(id, a)) == list(map(id, b))


def alike(a: Stage, b: Stage) -> bool:
    """Whether two stages compute the same: the same blocks, windows, lambdas and source."""
    if not same(a.blocks, b.blocks) or (a.windows, a.source) != (b.windows, b.source):
        return False
    return all(
        mx.array_equal(x, y).item()
        for one, other in zip(a.lambdas(), b.lambdas(), strict=True)
        for x, y in zip(one, other, strict=True)
    )
