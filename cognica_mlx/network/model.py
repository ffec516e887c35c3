"""The Cognica-PoE network in MLX: embedding, stages, heads and their predictions.

- in: token ids (B, T) or boundary activations (`Hidden`)
- out: boundary activations, and float32 logits or Log-OP scores (B, T, V)
- it knows nothing about sampling, modes or files
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from weakref import WeakSet

import mlx.core as mx
import mlx.nn as nn

from cognica_mlx.backend.kernels import FEW, norm, softcap
from cognica_mlx.backend.streams import end_with_thread
from cognica_mlx.backend.traces import Traces
from cognica_mlx.cache.hidden import Hidden
from cognica_mlx.calibration_file import Calibration
from cognica_mlx.config import SMEAR_CHANNELS, SUMMED, PoEConfig
from cognica_mlx.errors import RequestError
from cognica_mlx.network.linear import Linear
from cognica_mlx.network.quantized_copies import copies_of, quantized
from cognica_mlx.network.stages import Block, Stage, alike, same
from cognica_mlx.scheme import Scheme


def log_softmax(logits: mx.array) -> mx.array:
    """Normalized log-probabilities over the last axis."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def log_op(logits: Sequence[mx.array], weights: Sequence[float]) -> mx.array:
    """Logarithmic opinion pool: the weighted sum of the predictors' log-probabilities.

    `logits` are (..., V) each. The result is an unnormalized score: subtract its logsumexp to get
    log-probabilities.
    """
    return sum(
        (w * log_softmax(z) for z, w in zip(logits[1:], weights[1:], strict=True)),
        start=weights[0] * log_softmax(logits[0]),
    )


def _arrays(part: object) -> list[mx.array]:
    if isinstance(part, mx.array):
        return [part]
    if isinstance(part, dict):
        return [array for value in part.values() for array in _arrays(value)]
    return [array for value in part for array in _arrays(value)] if isinstance(part, list) else []


# Logits, or a function that waits until another machine has computed them.
Asked = mx.array | Callable[[], mx.array]


def answers(asked: Sequence[Asked]) -> list[mx.array]:
    """The logits that were asked for. Those of this machine are computed before it waits for
    others, so that all machines work at the same time."""
    here = [one for one in asked if isinstance(one, mx.array)]
    if len(here) < len(asked):
        mx.eval(here)
    return [one if isinstance(one, mx.array) else one() for one in asked]


class PoEModel(nn.Module):
    """A Cognica Product-of-Experts language model, base or specialist.

    Parameters have the released checkpoints' names without `transformer.`, with two exceptions:
    value embeddings are `h.{i}.attn.value_embed`, and specialists' heads are
    `lm_head_specialists.{i}`, in stacking order. Building a model evaluates nothing: a weight takes
    no memory until it is used or loaded.
    """

    def __init__(self, config: PoEConfig):
        super().__init__()
        self.config = config
        # Bounds belong to these weights, so they travel with them to every mode and command.
        self.calibration: Calibration | None = None
        # Why the calibration file beside the model cannot be used.
        self.calibration_problem: str | None = None
        # The hub commits that it was loaded from, as `--revision` takes them.
        self.revision: str | None = None
        # The model in memory that this one shares its lower stages with: see `share_base`.
        self._base: PoEModel | None
        object.__setattr__(self, "_base", None)  # its parameters are not this model's
        # Quantized copies stored beside the model, each with the function that loads it: see
        # `quantize_prefix`.
        self.stored_copies: dict[Scheme, Callable[[], None]]
        object.__setattr__(self, "stored_copies", {})
        self._variants: WeakSet[Stage] = WeakSet()
        self._stages: tuple[tuple[mx.array, ...], tuple[Stage, ...]] | None = None
        # Stages held by other machines.
        self._elsewhere: dict[int, Stage] = {}
        # Of what is computed around the stages.
        self.traces = Traces()
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
        """Number of predictors: the base's stages, then one for each specialist."""
        return self.config.poe_n_stages

    @property
    def poe_stage_boundary_layers(self) -> tuple[int, ...]:
        """The last layer of each stage, counted from 0."""
        return self.config.poe_stage_boundary_layers

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages, in the order in which they run. A stage that computes the same as one of the
        base in memory is the base's own object."""
        made_of = (self.resid_lambdas, self.x0_lambdas)
        if self._stages is None or not same(self._stages[0], made_of):
            self._stages = made_of, self._make_stages()
        return self._stages[1]

    def _make_stages(self) -> tuple[Stage, ...]:
        own = [
            self._elsewhere.get(k) or Stage(self, self.config.stage_range(k), k)
            for k in range(self.poe_n_stages)
        ]
        if self._base is None:
            return tuple(own)
        # Specialists may share a stage that has other lambdas than the base's.
        known = [*self._base.stages, *self._base._variants]
        for k, stage in enumerate(own):
            own[k] = next((other for other in known if alike(stage, other)), stage)
        self._base._variants.update(own)
        return tuple(own)

    def arrays_around(self) -> list[mx.array]:
        """The arrays of what is computed around the stages: embedding, smear, heads."""
        return [a for name, part in self.items() if name != "h" for a in _arrays(part)]

    def place(self, stages: Mapping[int, Stage]) -> None:
        """Replace stages by those that other machines hold."""
        self._elsewhere.update(stages)
        self._stages = None

    @property
    def full_boundaries(self) -> tuple[int, ...]:
        """The stages that the full-depth prediction reads boundary activations of."""
        last = self.poe_n_stages - 1
        return tuple(range(last + 1)) if self.pools_stages else (last,)

    @property
    def pools_stages(self) -> bool:
        """Whether the full-depth prediction is the Log-OP of all stages rather than the last's."""
        return self.config.per_stage_head and not self.config.specialist_layers

    def embed(self, tokens: mx.array, previous: mx.array | None = None) -> Hidden:
        """Embed and smear tokens (B, T): the first stage's input.

        `previous` (B, 1) is the token before them, or None at the start of the text: the smear
        mixes the previous position's embedding into each position.
        """
        end_with_thread()
        if previous is None:
            x = self.embeddings(tokens)
            smeared = mx.concatenate([x[:, :1], self.smear(x)], axis=1)
        elif tokens.size > FEW:
            smeared = self._embedded(tokens, previous)
        else:
            key = "embed", tokens.shape
            (smeared,) = self.traces.run(
                key, lambda *ids: [self._embedded(*ids)], (tokens, previous)
            )
        return Hidden(tokens, smeared, smeared)

    def _embedded(self, tokens: mx.array, previous: mx.array) -> mx.array:
        return self.smear(self.embeddings(mx.concatenate([previous, tokens], axis=1)))

    def embeddings(self, tokens: mx.array) -> mx.array:
        """The normalized embeddings of tokens (B, T), before the smear: (B, T, D)."""
        return norm(self.wte(tokens).astype(self.resid_lambdas.dtype))

    def smear(self, x: mx.array) -> mx.array:
        """Mix the previous embedding into each: (B, T + 1, D) in, the last T of them out."""
        after = x[:, 1:]
        gate = self.smear_lambda * mx.sigmoid(self.smear_gate(after[..., :SMEAR_CHANNELS]))
        return after + gate * x[:, :-1]

    def stage_logits(self, stage: int, hidden: Hidden) -> mx.array:
        """The prediction at the boundary of `stage`, (B, T, V) float32.

        A base stage predicts without backout, through the shared head and its own if it has one. A
        specialist stage predicts with backout; with `head_mode` "dual" through the shared head and
        the heads of all specialists up to it, with "base" without its own head, with "specialist"
        through its own head alone (which in a merged folder is already the sum).
        """
        return answers([self.ask_logits(stage, hidden)])[0]

    def ask_logits(self, stage: int, hidden: Hidden) -> Asked:
        """`stage_logits`, or if another machine computes them, which starts now, a function that
        waits for them; see `answers`."""
        if asked := self.stages[stage].ask_logits(hidden):
            return asked
        if stage < len(self.config.stage_layers):
            return self._head_logits(norm(hidden.x), self.heads(stage))
        return self.final_logits(hidden, self.heads(stage))

    def final_logits(self, hidden: Hidden, heads: Sequence[nn.Module]) -> mx.array:
        """Activations at the last boundary, after backout, through `heads`: (B, T, V) float32."""
        assert hidden.backout is not None, "the last boundary lies beyond the backout layer"
        h = norm(hidden.x - self.backout_lambda * hidden.backout)
        return self._head_logits(h, heads)

    def heads(self, stage: int) -> list[nn.Module]:
        """The heads that `stage` predicts through; their logits are summed."""
        specialist = stage - len(self.config.stage_layers)
        if specialist >= 0:
            return self._final_heads(specialist)
        return [self.lm_head, *([self.lm_head_stages[stage]] if self.config.per_stage_head else [])]

    def draft_logits(self, stage: int, hidden: Hidden) -> mx.array:
        """A base stage's activations, without backout, through the heads of the final prediction.

        (B, T, V) float32. Meaningless for a base model; improves a specialist's drafts.
        """
        return answers([self.ask_draft_logits(hidden)])[0]

    def ask_draft_logits(self, hidden: Hidden) -> Asked:
        """`draft_logits`, as `ask_logits` asks for `stage_logits`."""
        if asked := self.stages[-1].ask_logits(hidden, drafts=True):
            return asked
        last = len(self.config.specialist_layers) - 1
        return self._head_logits(norm(hidden.x), self._final_heads(last))

    def shallow_scores(self, hidden: Sequence[Hidden]) -> mx.array:
        """Draft scores (B, T, V) float32 of specialists that run on an early stage of the base;
        `hidden` holds the output of each specialist stage."""
        return self._shallow_logits(hidden[-1], self._final_heads(len(hidden) - 1))

    def _shallow_logits(self, hidden: Hidden, heads: Sequence[nn.Module]) -> mx.array:
        if hidden.backout is not None:
            return self.final_logits(hidden, heads)
        return self._head_logits(norm(hidden.x), heads)

    def with_quantized_heads(self, scheme: Scheme) -> PoEModel:
        """This model with quantized copies of its heads; made once for each scheme."""
        kept: dict[Scheme, PoEModel] = copies_of(self)
        if scheme not in kept:
            kept[scheme] = self._quantize_heads(scheme)
        return kept[scheme]

    def _quantize_heads(self, scheme: Scheme) -> PoEModel:
        other = copy.copy(self)
        other.__dict__.pop("_copies", None)
        other.traces = Traces()
        other.lm_head = quantized(self.lm_head, scheme)
        for name in ("lm_head_stages", "lm_head_specialists"):
            if name in self:
                other[name] = [quantized(head, scheme) for head in self[name]]
        return other

    def _final_heads(self, specialist: int) -> list[nn.Module]:
        """The heads that a specialist stage predicts through; their logits are summed."""
        if self.config.head_mode in ("specialist", SUMMED):
            return [self.lm_head_specialists[specialist]]
        count = specialist + (self.config.head_mode == "dual")
        return [self.lm_head, *self.lm_head_specialists[:count]]

    def full_scores(
        self, hidden: Mapping[int, Hidden], known: Mapping[int, mx.array] | None = None
    ) -> mx.array:
        """The full-depth prediction, (B, T, V) float32, from the boundaries in `full_boundaries`.

        Flat bases: backout, then the shared head. Per-stage heads: the Log-OP of all stages, their
        sum divided by `n_stages ** (1 - poe_alpha)`. Specialists: the last stage's logits. Logits
        in `known`, by stage, are not computed again.
        """
        if not self.pools_stages and not self.config.specialist_layers:
            return self.final_logits(hidden[self.poe_n_stages - 1], [self.lm_head])
        logits = self._logits(hidden, known)
        return self.pool(logits) if self.pools_stages else logits[0]

    def _logits(
        self, hidden: Mapping[int, Hidden], known: Mapping[int, mx.array] | None
    ) -> list[mx.array]:
        """The logits of the stages in `full_boundaries`, taken from `known` where possible."""
        known = known or {}
        return [
            known[k] if k in known else self.stage_logits(k, hidden[k])
            for k in self.full_boundaries
        ]

    def pool(self, logits: Sequence[mx.array]) -> mx.array:
        """The Log-OP of the first stages' logits (B, T, V), pooled as the full model pools all."""
        weight = len(logits) ** (self.config.poe_alpha - 1)
        return log_op(logits, [weight] * len(logits))

    def _head_logits(self, h: mx.array, heads: Sequence[nn.Module]) -> mx.array:
        size = self.config.vocab_size
        first, *others = (head(h)[..., :size].astype(mx.float32) for head in heads)
        return softcap(sum(others, start=first))

    def __call__(self, tokens: mx.array) -> mx.array:
        """Full-depth logits (flat) or Log-OP scores of tokens (B, T): (B, T, V) float32."""
        return self.full_scores(dict(enumerate(self.boundaries(tokens))))

    def forward_stage(self, tokens: mx.array, stage: int) -> mx.array:
        """Logits at the boundary of `stage` alone, (B, T, V) float32.

        Raises RequestError if the model has no such stage.
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

    def check_ids(self, tokens: Sequence[int]) -> None:
        """Raise RequestError for a token id outside the vocabulary."""
        size = self.config.vocab_size
        if not tokens or (min(tokens) >= 0 and max(tokens) < size):
            return
        token = next(token for token in tokens if not 0 <= token < size)
        raise RequestError(f"token id {token} is outside the vocabulary of {size}")

    def boundaries(self, tokens: mx.array, last_stage: int | None = None) -> list[Hidden]:
        """The output of every stage up to `last_stage` (default: the last) for tokens (B, T)."""
        last_stage = self.poe_n_stages - 1 if last_stage is None else last_stage
        given = [self.embed(tokens)]
        for stage in self.stages[: last_stage + 1]:
            given.append(stage(given[stage.source]))
        return given[1:]

    def predictions(self, tokens: mx.array) -> list[mx.array]:
        """The predictions of each stage and then of the full model for tokens (B, T), from one
        forward pass: `poe_n_stages` + 1 arrays (B, T, V) float32."""
        hidden = dict(enumerate(self.boundaries(tokens)))
        stages = {k: self.stage_logits(k, h) for k, h in hidden.items()}
        return [*stages.values(), self.full_scores(hidden, stages)]

    def stack(self) -> None:
        """Lay the matrices out for a GPU: see `Attention.stack`."""
        for block in self.h:
            if isinstance(block, Block):  # held here, not on another machine
                block.attn.stack()
                mx.eval(block.attn.parameters())  # block by block, so that little is held twice
