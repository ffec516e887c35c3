"""The Cognica-PoE network in MLX: blocks, heads, and one forward over a range of layers.

- in: token ids (B, T) or boundary activations (`Hidden`); optionally a key-value cache per layer
- out: boundary activations, and float32 logits or Log-OP scores (B, T, V)
- every path (prefill, one token, a batch of drafts, a catch-up) goes through `run_layers`
- it knows nothing about sampling, modes or files
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from cognica_mlx.cache import LayerCache, window_mask
from cognica_mlx.calibration import Calibration
from cognica_mlx.config import SMEAR_CHANNELS, SUMMED, VALUE_GATE_CHANNELS, PoEConfig
from cognica_mlx.elementwise import gated, mixed, relu_squared, softcap
from cognica_mlx.errors import RequestError
from cognica_mlx.linear import Linear, first_rows
from cognica_mlx.shortlist import ShortlistHead

NORM_EPS = 1.1920929e-07
# Queries and keys are each scaled by this after their norm (nanochat's sharper attention).
QK_SCALE = 1.2


def norm(x: mx.array) -> mx.array:
    """RMSNorm over the last axis, without a learned weight."""
    return mx.fast.rms_norm(x, None, NORM_EPS)


def log_softmax(logits: mx.array) -> mx.array:
    """Normalised log-probabilities over the last axis."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def log_op(logits: Sequence[mx.array], weights: Sequence[float]) -> mx.array:
    """Logarithmic opinion pool: the weighted sum of the predictors' log-probabilities.

    `logits` are (..., V) each. The result is a score; probabilities need another logsumexp.
    """
    return sum(
        (w * log_softmax(z) for z, w in zip(logits[1:], weights[1:], strict=True)),
        start=weights[0] * log_softmax(logits[0]),
    )


@dataclass(frozen=True)
class Hidden:
    """Consecutive positions at a stage boundary: all that the next stage needs of them.

    tokens (B, T) int; x and x0 (B, T, D), the residual stream and the smeared embedding;
    backout (B, T, D) from the boundary on that lies beyond the backout layer, before it None.
    """

    tokens: mx.array
    x: mx.array
    x0: mx.array
    backout: mx.array | None = None

    def __len__(self) -> int:
        return self.tokens.shape[1]

    def __getitem__(self, positions: slice) -> Hidden:
        backout = None if self.backout is None else self.backout[:, positions]
        return Hidden(
            self.tokens[:, positions], self.x[:, positions], self.x0[:, positions], backout
        )

    @staticmethod
    def concatenate(parts: Sequence[Hidden]) -> Hidden:
        """Join runs of positions that follow each other."""
        if len(parts) == 1:
            return parts[0]
        backouts = [part.backout for part in parts if part.backout is not None]
        return Hidden(
            mx.concatenate([part.tokens for part in parts], axis=1),
            mx.concatenate([part.x for part in parts], axis=1),
            mx.concatenate([part.x0 for part in parts], axis=1),
            mx.concatenate(backouts, axis=1) if backouts else None,
        )

    def arrays(self) -> list[mx.array]:
        """Its arrays, for evaluation and for counting bytes."""
        return [a for a in (self.tokens, self.x, self.x0, self.backout) if a is not None]


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
        # Rotation is by minus theta: mx.fast.rope divides positions by these.
        halves = mx.arange(0, self.head_dim, 2, dtype=mx.float32) / self.head_dim
        self._freqs = -(config.rope_theta**halves)
        # The scale of 1.2 on queries and on keys is folded into attention's own.
        self._scale = QK_SCALE**2 * self.head_dim**-0.5

    def _heads(self, x: mx.array) -> mx.array:
        """(B, T, H * head_dim) -> (B, H, T, head_dim)."""
        batch, length, _ = x.shape
        return x.reshape(batch, length, -1, self.head_dim).transpose(0, 2, 1, 3)

    def __call__(
        self,
        u: mx.array,
        tokens: mx.array,
        mask: mx.array | str | None,
        cache: LayerCache | None,
    ) -> mx.array:
        # Queries and keys are rotated and normalised together: half as many kernels.
        qk = mx.fast.rope(
            self._heads(mx.concatenate([self.c_q(u), self.c_k(u)], axis=-1)),
            self.head_dim,
            traditional=False,
            base=None,
            scale=1.0,
            offset=0 if cache is None else cache.offset,
            freqs=self._freqs,
        )
        q, k = mx.split(norm(qk), [self.n_head], axis=1)
        v = self._heads(self.c_v(u))
        if "value_embed" in self:
            gate = self.ve_gate(u[..., :VALUE_GATE_CHANNELS])  # (B, T, n_kv_head)
            embedded = self._heads(self.value_embed(tokens))
            v = gated(v, gate.transpose(0, 2, 1)[..., None], embedded)
        if cache is not None:
            k, v = cache.update(k, v)
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=self._scale, mask=mask)
        return self.c_proj(out.transpose(0, 2, 1, 3).reshape(u.shape[0], u.shape[1], -1))


class MLP(nn.Module):
    """Two matrices around a squared ReLU."""

    def __init__(self, config: PoEConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.intermediate_size, bias=False)
        self.c_proj = Linear(config.intermediate_size, config.n_embd, bias=False)

    def __call__(self, u: mx.array) -> mx.array:
        return self.c_proj(relu_squared(self.c_fc(u)))


class Block(nn.Module):
    """One layer: attention and MLP, each on the normalised residual stream."""

    def __init__(self, config: PoEConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def __call__(
        self,
        x: mx.array,
        tokens: mx.array,
        mask: mx.array | str | None,
        cache: LayerCache | None,
    ) -> mx.array:
        x = x + self.attn(norm(x), tokens, mask, cache)
        return x + self.mlp(norm(x))


class PoEModel(nn.Module):
    """A Cognica Product-of-Experts language model, base or specialist.

    Parameters carry the released checkpoints' names without `transformer.`, but for two: value
    embeddings are `h.{i}.attn.value_embed`, and specialists' heads `lm_head_specialists.{i}` in
    the order in which they stack. Building one evaluates nothing: no weight takes memory before
    it is used or loaded.
    """

    def __init__(self, config: PoEConfig):
        super().__init__()
        self.config = config
        self.calibration: Calibration | None = None
        self._shortlists: dict[int, ShortlistHead] = {}
        rows, width = config.padded_vocab_size, config.n_embd
        self.wte: nn.Module = nn.Embedding(rows, width)
        self.smear_gate = Linear(SMEAR_CHANNELS, 1, bias=False)
        self.smear_lambda = mx.zeros((1,))
        self.backout_lambda = mx.zeros((1,))
        self.resid_lambdas = mx.ones((config.n_layer,))
        self.x0_lambdas = mx.zeros((config.n_layer,))
        self.h = [Block(config, i) for i in range(config.n_layer)]
        self.lm_head: nn.Module = Linear(width, rows, bias=False)
        if config.per_stage_head:
            self.lm_head_stages = [Linear(width, rows, bias=False) for _ in config.stage_layers]
        if config.specialist_layers:
            self.lm_head_specialists = [
                Linear(width, rows, bias=False) for _ in config.specialist_layers
            ]

    @property
    def poe_n_stages(self) -> int:
        """Predictors in a row; a specialist is one more."""
        return self.config.poe_n_stages

    @property
    def poe_stage_boundary_layers(self) -> tuple[int, ...]:
        """The last layer of each stage, counted from 0."""
        return self.config.poe_stage_boundary_layers

    @property
    def stage_inputs(self) -> tuple[int, ...]:
        """What each stage takes in: 0 is the embedded text, k + 1 what stage k gives out."""
        return tuple(range(self.poe_n_stages))

    @property
    def full_boundaries(self) -> tuple[int, ...]:
        """The stages whose boundary activations the full-depth prediction reads."""
        last = self.poe_n_stages - 1
        return tuple(range(last + 1)) if self.pools_stages else (last,)

    @property
    def pools_stages(self) -> bool:
        """Whether the full-depth prediction is the Log-OP of all stages, or the last one's own."""
        return self.config.per_stage_head and not self.config.specialist_layers

    def embed(self, tokens: mx.array, previous: mx.array | None = None) -> Hidden:
        """Embed and smear tokens (B, T): what the first stage takes in.

        `previous` (B, 1) is the token before them, None where they open the text: the smear
        mixes into each position the embedding of the one before it.
        """
        ids = tokens if previous is None else mx.concatenate([previous, tokens], axis=1)
        x = self.embeddings(ids)
        smeared = self.smear(x)
        if previous is None:
            smeared = mx.concatenate([x[:, :1], smeared], axis=1)
        return Hidden(tokens, smeared, smeared)

    def embeddings(self, tokens: mx.array) -> mx.array:
        """The normalised embeddings of tokens (B, T), before the smear: (B, T, D)."""
        # Tables in MLX's floating-point modes give bfloat16 whatever the model runs in.
        return norm(self.wte(tokens).astype(self.resid_lambdas.dtype))

    def smear(self, x: mx.array) -> mx.array:
        """Mix into each embedding the one before it: (B, T + 1, D) in, the last T of them out."""
        after = x[:, 1:]
        gate = self.smear_lambda * mx.sigmoid(self.smear_gate(after[..., :SMEAR_CHANNELS]))
        return after + gate * x[:, :-1]

    def run_layers(
        self, hidden: Hidden, layers: range, caches: Sequence[LayerCache] | None = None
    ) -> Hidden:
        """Run positions through `layers`; (B, T, D) in, (B, T, D) out.

        `caches`, one for every layer of the model, hold the positions before these; without them
        the positions are the whole text.
        """
        tokens, x, x0, backout = hidden.tokens, hidden.x, hidden.x0, hidden.backout
        windows = self.config.windows
        masks: dict[int, mx.array | str | None] = {}
        for i in layers:
            cache = None if caches is None else caches[i]
            if windows[i] not in masks:
                masks[windows[i]] = (
                    window_mask(windows[i], 0, len(hidden))
                    if cache is None
                    else cache.mask(len(hidden))
                )
            x = mixed(self.resid_lambdas[i], x, self.x0_lambdas[i], x0)
            x = self.h[i](x, tokens, masks[windows[i]], cache)
            if i == self.config.backout_layer:
                backout = x
        return Hidden(tokens, x, x0, backout)

    def stage_logits(self, stage: int, hidden: Hidden) -> mx.array:
        """The prediction at the boundary of `stage`, (B, T, V) float32.

        A base stage speaks without backout through the shared head and its own, if it has one; a
        specialist stage with backout, through the shared head and those of the specialists up to
        it (`head_mode` picks "dual", or "base" or "specialist", its nearest one alone; in a merged
        folder that one is the sum already).
        """
        in_base = stage < len(self.config.stage_layers)
        h = norm(hidden.x) if in_base else self._after_backout(hidden)
        return self._head_logits(h, self.heads(stage))

    def heads(self, stage: int) -> list[nn.Module]:
        """The heads that `stage` speaks through; their logits add up."""
        specialist = stage - len(self.config.stage_layers)
        if specialist >= 0:
            return self._final_heads(specialist)
        return [self.lm_head, *([self.lm_head_stages[stage]] if self.config.per_stage_head else [])]

    def draft_logits(self, stage: int, hidden: Hidden) -> mx.array:
        """A base stage's activations, without backout, through the heads of the final prediction.

        (B, T, V) float32. Of no meaning to the base, but a specialist's drafts come out better.
        """
        last = len(self.config.specialist_layers) - 1
        return self._head_logits(norm(hidden.x), self._final_heads(last))

    def with_short_heads(self, rows: int) -> PoEModel:
        """This model predicting among the first `rows` tokens only; all arrays are shared."""
        short = copy.copy(self)
        short.lm_head = first_rows(self.lm_head, rows)
        for name in ("lm_head_stages", "lm_head_specialists"):
            if name in self:
                setattr(short, name, [first_rows(head, rows) for head in self[name]])
        return short

    def with_shortlist(self, rank: int) -> PoEModel:
        """This model with a head that is cheaper to draft with: see `ShortlistHead`.

        Made once for each rank, as that takes seconds. Raises RequestError where the model speaks
        through several heads, or a quantised one, or the rank is none of such a matrix.
        """
        width = self.config.n_embd
        if not 1 <= rank < width:
            raise RequestError(f"draft_rank {rank} is not between 1 and {width - 1}")
        if "lm_head_stages" in self or "lm_head_specialists" in self:
            raise RequestError("draft_rank needs a model with one head; this one has several")
        if not isinstance(self.lm_head, nn.Linear):
            raise RequestError("draft_rank: this model's head is quantised, and cheap already")
        if rank not in self._shortlists:
            self._shortlists[rank] = ShortlistHead(self.lm_head.weight, rank)
        short = copy.copy(self)
        short.lm_head = self._shortlists[rank]
        return short

    def _final_heads(self, specialist: int) -> list[nn.Module]:
        """The heads that a specialist stage speaks through; their logits add up."""
        heads: list[nn.Module] = [self.lm_head]
        if self.config.head_mode in ("specialist", SUMMED):
            heads = [self.lm_head_specialists[specialist]]
        elif self.config.head_mode == "dual":
            heads += self.lm_head_specialists[: specialist + 1]
        else:
            heads += self.lm_head_specialists[:specialist]
        return heads

    def full_scores(self, hidden: Mapping[int, Hidden]) -> mx.array:
        """The full-depth prediction, (B, T, V) float32, from the boundaries in `full_boundaries`.

        Flat bases: backout, then the shared head. Per-stage heads: the Log-OP of all stages, whose
        sum is divided by `n_stages ** (1 - poe_alpha)`. Specialists: the last stage's logits.
        """
        last = self.poe_n_stages - 1
        if self.pools_stages:
            return self.pool([self.stage_logits(k, hidden[k]) for k in range(last + 1)])
        if self.config.specialist_layers:
            return self.stage_logits(last, hidden[last])
        return self._head_logits(self._after_backout(hidden[last]), [self.lm_head])

    def pool(self, logits: Sequence[mx.array]) -> mx.array:
        """The Log-OP of the first stages' logits (B, T, V), as the full model pools all."""
        weight = len(logits) ** (self.config.poe_alpha - 1)
        return log_op(logits, [weight] * len(logits))

    def _after_backout(self, hidden: Hidden) -> mx.array:
        assert hidden.backout is not None, "the last boundary lies beyond the backout layer"
        return norm(hidden.x - self.backout_lambda * hidden.backout)

    def _head_logits(self, h: mx.array, heads: Sequence[nn.Module]) -> mx.array:
        size = self.config.vocab_size
        first, *others = (head(h)[..., :size].astype(mx.float32) for head in heads)
        return softcap(sum(others, start=first))

    def __call__(self, tokens: mx.array) -> mx.array:
        """Full-depth logits (flat) or Log-OP scores of tokens (B, T): (B, T, V) float32."""
        return self.full_scores(dict(enumerate(self.boundaries(tokens))))

    def forward_stage(self, tokens: mx.array, stage: int) -> mx.array:
        """Logits at the boundary of `stage` alone, (B, T, V) float32.

        Raises RequestError where the model has no such stage.
        """
        self.check_stage(stage)
        return self.stage_logits(stage, self.boundaries(tokens, stage)[-1])

    def forward_all_stages(self, tokens: mx.array) -> list[mx.array]:
        """Logits at every stage boundary in one pass: `poe_n_stages` of (B, T, V) float32."""
        return [self.stage_logits(k, hidden) for k, hidden in enumerate(self.boundaries(tokens))]

    def check_stage(self, stage: int, what: str = "stage") -> None:
        """Raise RequestError unless the model has this stage."""
        if not 0 <= stage < self.poe_n_stages:
            raise RequestError(
                f"{what} {stage}: this model has stages 0 to {self.poe_n_stages - 1}"
            )

    def boundaries(self, tokens: mx.array, last_stage: int | None = None) -> list[Hidden]:
        """What every stage up to `last_stage` (all of them) gives out for tokens (B, T)."""
        last_stage = self.poe_n_stages - 1 if last_stage is None else last_stage
        given = [self.embed(tokens)]
        for stage in range(last_stage + 1):
            hidden = given[self.stage_inputs[stage]]
            given.append(self.run_layers(hidden, self.config.stage_range(stage)))
        return given[1:]
