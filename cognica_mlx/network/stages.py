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

from cognica_mlx.backend.kernels import (
    Rotation,
    gated,
    heads_of,
    mixed,
    norm,
    relu_squared,
)
from cognica_mlx.backend.traces import Traces
from cognica_mlx.cache.attention import Visible
from cognica_mlx.cache.fixed_pass import FixedAttention, FixedPass
from cognica_mlx.cache.hidden import Hidden
from cognica_mlx.cache.keys_and_values import AttentionCache, Done, KeysAndValues
from cognica_mlx.cache.packed_pass import arranged, begin
from cognica_mlx.cache.stage_cache import StageCache
from cognica_mlx.config import VALUE_GATE_CHANNELS, PoEConfig
from cognica_mlx.network.linear import Linear, added

if TYPE_CHECKING:
    from cognica_mlx.network.model import PoEModel
    from cognica_mlx.scheme import Scheme

# Queries and keys are each scaled by this after their norm (nanochat's sharper attention).
QK_SCALE = 1.2


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

    def __call__(
        self, u: mx.array, tokens: mx.array, cache: AttentionCache, rotate: Rotation
    ) -> mx.array:
        """The input of `c_proj` (N, H * head_dim), from rows u (N, D) of tokens (B, T)."""
        batch, length = tokens.shape
        width = self.n_head * self.head_dim
        kv_width = self.n_kv_head * self.head_dim
        if self._qkv is not None:
            joined = self._qkv(u)
            qk, v = joined[:, : width + kv_width], joined[:, width + kv_width :]
        else:
            qk, v = mx.concatenate([self.c_q(u), self.c_k(u)], axis=-1), self.c_v(u)
        # Queries and keys are rotated and normalized together: half as many operations.
        q, k, scale = rotate.heads(qk, self.head_dim, self.n_head, self._scale)
        v = heads_of(v, batch, length, self.head_dim)
        if "value_embed" in self:
            gate = heads_of(self.ve_gate(u[:, :VALUE_GATE_CHANNELS]), batch, length, 1)
            # Tables in MLX's floating-point modes return bfloat16 whatever the model's dtype.
            embedded = self.value_embed(tokens.reshape(-1)).astype(v.dtype)
            v = gated(v, gate, heads_of(embedded, batch, length, self.head_dim))
        out = cache.attend(q, k, v, scale)
        if length > 1:
            out = out.transpose(0, 2, 1, 3)
        return out.reshape(len(u), -1)


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

    def __call__(
        self, x: mx.array, tokens: mx.array, cache: AttentionCache, rotate: Rotation
    ) -> mx.array:
        """The residual stream (N, D) after this layer, for rows x (N, D) of tokens (B, T)."""
        x = added(x, self.attn.c_proj, self.attn(norm(x), tokens, cache, rotate))
        return added(x, self.mlp.c_proj, self.mlp(norm(x)))


class Stage:
    """Consecutive blocks that run together, from one boundary to another; requests name a stage.

    `source` is the boundary that it reads: 0 is the embedded text, k + 1 the output of stage k.
    Models over one base share its stage objects, so that positions of all of them can go through a
    stage in one pass. A stage on another machine brings its own `new_cache`, `order`, `plan`, `run`
    and `ask_logits`; `rank` is that machine, and `dispensable` says whether decoding goes on with
    the stages before it once the machine is lost.
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
        self.traces = Traces()

    def new_cache(self, slack: int) -> KeysAndValues:
        """An empty cache for one sequence's keys and values in this stage."""
        return StageCache(self.windows, slack)

    @property
    def makes_backout(self) -> bool:
        """Whether the backout layer is one of its own."""
        return self._backout_layer in self.layers

    def order(self, caches: Sequence[Any], counts: Sequence[int]) -> list[int]:
        """The order in which caches of this stage share a pass of `counts` positions, which `run`
        must follow."""
        return arranged(caches, counts)

    def plan(self, caches: Sequence[Any], counts: Sequence[int]) -> Any:
        """How to run the next `counts` positions of each cache, in the order of `order`. With its
        `starts`, the rows of the output at which each cache's positions begin."""
        return begin(caches, counts)

    def run(self, hidden: Hidden, plan: Any) -> tuple[Hidden, Sequence[Done]]:
        """Run positions, which `hidden` holds one cache's after the other. Returns the output, and
        what to commit to each cache; nothing has changed before that."""
        if isinstance(plan, FixedPass):
            return replay([self], hidden, [plan])[0]
        return self(plan.spread(hidden), [plan] * len(self.blocks)), plan.done()

    def arrays(self) -> list[mx.array]:
        """All arrays that its blocks compute with, but for the lambdas."""
        parts = [part for block in self.blocks for part in (block.attn, block.mlp)]
        modules = [module for part in parts for module in part.values()]
        return [a for module in modules for a in module.values() if isinstance(a, mx.array)]

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
        tokens = hidden.tokens
        batch, length = tokens.shape
        if caches is None:
            whole = {w: Visible(w, 0, length) for w in set(self.windows)}
            caches = [whole[w] for w in self.windows]
        # As rows: a matrix product of two dimensions is one operation.
        x = hidden.x.reshape(batch * length, -1)
        x0 = x if hidden.x0 is hidden.x else hidden.x0.reshape(batch * length, -1)
        rotate = self.rotation(caches[0].offset, tokens)
        x, made = self.layers_on(tokens, x, x0, caches, rotate)
        backout = hidden.backout if made is None else made.reshape(batch, length, -1)
        return Hidden(tokens, x.reshape(batch, length, -1), hidden.x0, backout)

    def rotation(self, offset: int | mx.array, tokens: mx.array) -> Rotation:
        """The rotary embedding of tokens (B, T) from `offset` on."""
        batch, length = tokens.shape
        return Rotation(offset, batch, length, self._model.config.rope_theta)

    def layers_on(
        self,
        tokens: mx.array,
        x: mx.array,
        x0: mx.array,
        caches: Sequence[AttentionCache],
        rotate: Rotation,
    ) -> tuple[mx.array, mx.array | None]:
        """The blocks on rows (N, D) of tokens (B, T): the residual stream, and as it is after
        the backout layer, if that is one of these, (1, N, D)."""
        backout = None
        parts = zip(self.layers, self.blocks, self.lambdas(), caches, strict=True)
        for i, block, (keep, again), attention in parts:
            x = block(mixed(keep, x, again, x0), tokens, attention, rotate)
            if i == self._backout_layer:
                backout = x.reshape(1, *x.shape)
                x = backout.reshape(x.shape)
        return x, backout


def replay(
    stages: Sequence[Stage], hidden: Hidden, plans: Sequence[FixedPass]
) -> list[tuple[Hidden, Sequence[Done]]]:
    """Run positions through consecutive stages, from one trace; returns what `Stage.run` does for
    each of them."""
    hidden = plans[0].spread(hidden)
    rows = len(hidden)
    streams = [hidden.x] if hidden.x0 is hidden.x else [hidden.x, hidden.x0]
    # Usually the rows lie alike in all stages: then numbers, masks and rotations are shared.
    shared = all(
        plan.key == plans[0].key and same(plan.numbers, plans[0].numbers) for plan in plans
    )
    arrays = [hidden.tokens, *streams]
    places: list[tuple[slice, slice]] = []
    for plan in plans:
        numbers = places[0][0] if shared and places else _add(arrays, plan.numbers)
        places.append((numbers, _add(arrays, plan.buffers())))
    width = len(streams)

    def step(*arrays: mx.array) -> list[mx.array]:
        column = arrays[0].reshape(rows, 1)
        x, *others = (array.reshape(rows, -1) for array in arrays[1 : 1 + width])
        x0 = others[0] if others else x
        made: list[mx.array] = []
        attention: FixedAttention | None = None
        for stage, plan, (numbers, buffers) in zip(stages, plans, places, strict=True):
            if attention is None or not shared:
                attention = FixedAttention(
                    plan.key, stage.windows, arrays[numbers], arrays[buffers]
                )
                rotate = stage.rotation(attention.offset, column)
            else:
                attention = attention.next_stage(stage.windows, arrays[buffers])
            caches = [attention] * len(stage.blocks)
            x, backout = stage.layers_on(column, x, x0, caches, rotate)
            # What is handed out lies on the way to what follows, so that it is computed with it.
            given = x.reshape(1, rows, -1)
            x = given.reshape(rows, -1)
            made += [given] if backout is None else [given, backout]
            made += attention.buffers()
        return made

    # Of the deepest stage: a specialist's ends before the base's, which others share.
    key = tuple(map(id, stages)), tuple([p.key for p in plans]), shared, width, hidden.x.dtype.size
    out = stages[-1].traces.run(key, step, arrays)
    found: list[tuple[Hidden, Sequence[Done]]] = []
    at, backout = 0, hidden.backout
    for stage, plan, (_, buffers) in zip(stages, plans, places, strict=True):
        x, at = out[at], at + 1
        if stage.makes_backout:
            backout, at = out[at], at + 1
        stop = at + buffers.stop - buffers.start
        found.append((Hidden(hidden.tokens, x, hidden.x0, backout), plan.done(out[at:stop])))
        at = stop
    return found


def _add(arrays: list[mx.array], more: Sequence[mx.array]) -> slice:
    """Append arrays; returns where they are."""
    start = len(arrays)
    arrays += more
    return slice(start, len(arrays))


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
