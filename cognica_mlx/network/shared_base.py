"""Specialists over one base in memory: models that share its modules and differ above it.

- in: a base model and a specialist's model, and the embeddings that the specialist changes
- out: the specialist's model, with the base's own arrays in its lower blocks and heads
- `Siblings`: several specialists side by side, with their predictions pooled and the base run once
- `shared_stages` counts the stages that two such models share for a text, so that a decoding state
  can move from one to the other
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from cognica_mlx.cache.hidden import Hidden
from cognica_mlx.config import SUMMED, PoEConfig
from cognica_mlx.errors import RequestError
from cognica_mlx.network.model import PoEModel, answers, log_op
from cognica_mlx.network.stages import Stage
from cognica_mlx.scheme import Scheme


class PatchedEmbedding(nn.Module):
    """A shared embedding table with a few rows replaced."""

    def __init__(self, table: nn.Module, rows: list[int], values: mx.array, n_rows: int):
        super().__init__()
        self.rows = rows
        self.own = values
        # Private, because the table's parameters do not belong to this module.
        self._table = table
        # For each token 1 + its index in `values`, or 0.
        slots = mx.zeros((n_rows,), mx.int32)
        slots[mx.array(rows)] = mx.arange(1, len(rows) + 1, dtype=mx.int32)
        mx.eval(slots)  # private, so evaluating the parameters would miss it
        self._slots = slots

    def __call__(self, tokens: mx.array) -> mx.array:
        slots = self._slots[tokens]
        patch = self.own[mx.maximum(slots - 1, 0)]
        return mx.where((slots > 0)[..., None], patch, self._table(tokens))


def share_base(model: PoEModel, base: PoEModel, rows: list[int], values: mx.array) -> None:
    """Make `model`, a specialist over `base`, use the base's own modules for its lower layers.

    `rows` are the tokens with embeddings of their own, `values` (n, D). Everything that `model` has
    beyond the base stays its own, as do its lambdas.
    """
    config = base.config
    object.__setattr__(model, "_base", base)
    model.h = [*base.h, *model.h[config.n_layer :]]
    for name in ("lm_head", "lm_head_stages", "smear_gate", "smear_lambda", "backout_lambda"):
        if name in base:
            setattr(model, name, base[name])
    inherited = base.get("lm_head_specialists", [])
    model.lm_head_specialists = [*inherited, *model.lm_head_specialists[len(inherited) :]]
    if rows:
        model.wte = PatchedEmbedding(base.wte, rows, values, config.padded_vocab_size)
    else:
        model.wte = base.wte


class Siblings(PoEModel):
    """Specialists of one base side by side; the full prediction is their weighted Log-OP.

    `models` share a base through `share_base` and have one specialist stage each; `weights` are
    scaled to add up to one. Stage `len(stage_layers) + i` is the i-th specialist. Raises
    RequestError for specialists that change the base's part in different ways.
    """

    def __init__(self, models: Sequence[PoEModel], weights: Sequence[float]):
        first = models[0]
        stages, depth = len(first.config.stage_layers), first.config.base_n_layer
        total = sum(weights)
        if len(weights) != len(models) or not 0 < total < float("inf"):
            raise RequestError(
                f"weights {list(weights)}: give one for each of the {len(models)} specialists, "
                "adding up to more than 0"
            )
        for model in models:
            if len(model.config.specialist_layers) != 1 or model.config.head_mode == SUMMED:
                raise RequestError("only specialists directly on the base can be composed")
            if shared_stages(first, model, range(first.config.vocab_size)) < stages:
                raise RequestError(
                    "these specialists change the base's embeddings or lambdas in different ways, "
                    "so they cannot share its work"
                )
        own = tuple(model.config.specialist_layers[0] for model in models)
        fields = {**first.config.to_dict(), "n_layer": depth + sum(own), "specialist_layers": own}
        super().__init__(PoEConfig(**fields))
        self._models = tuple(models)
        self._shares = [weight / total for weight in weights]
        for name in ("lm_head", "lm_head_stages", "smear_gate", "smear_lambda", "backout_lambda"):
            if name in first:
                setattr(self, name, first[name])
        self.wte = first.wte
        self.h = [*first.h[:depth], *(block for model in models for block in model.h[depth:])]
        self.lm_head_specialists = [model.lm_head_specialists[0] for model in models]
        for name in ("resid_lambdas", "x0_lambdas"):
            parts = [first[name][:depth], *(model[name][depth:] for model in models)]
            setattr(self, name, mx.concatenate(parts))
            mx.eval(self[name])

    def _make_stages(self) -> tuple[Stage, ...]:
        """The base's stages, then each specialist's own stage, all fed by the base's output."""
        trunk = len(self.config.stage_layers)
        return (*self._models[0].stages[:trunk], *(model.stages[trunk] for model in self._models))

    @property
    def full_boundaries(self) -> tuple[int, ...]:
        """The specialists' stages."""
        return tuple(range(len(self.config.stage_layers), self.poe_n_stages))

    def full_scores(
        self, hidden: Mapping[int, Hidden], known: Mapping[int, mx.array] | None = None
    ) -> mx.array:
        """The weighted Log-OP of the specialists, (B, T, V) float32."""
        if known:
            return log_op(self._logits(hidden, known), self._shares)
        # Ask all before waiting for any, so that several machines work in parallel.
        asked = [self.ask_logits(k, hidden[k]) for k in self.full_boundaries]
        return log_op(answers(asked), self._shares)

    def draft_logits(self, stage: int, hidden: Hidden) -> mx.array:
        """A base stage's activations through each specialist's heads, pooled as `full_scores`."""
        asked = [model.ask_draft_logits(hidden) for model in self._models]
        return log_op(answers(asked), self._shares)

    def shallow_scores(self, hidden: Sequence[Hidden]) -> mx.array:
        """See `PoEModel`: pooled as in `full_scores`."""
        logits = [self._shallow_logits(h, self._final_heads(i)) for i, h in enumerate(hidden)]
        return log_op(logits, self._shares)

    def _quantize_heads(self, scheme: Scheme) -> PoEModel:
        other = super()._quantize_heads(scheme)
        assert isinstance(other, Siblings)
        other._models = tuple(model.with_quantized_heads(scheme) for model in self._models)
        return other

    def _final_heads(self, specialist: int) -> list[nn.Module]:
        """The heads that the i-th specialist predicts through."""
        return self._models[specialist].heads(len(self.config.stage_layers))


def shared_stages(a: PoEModel, b: PoEModel, tokens: Iterable[int]) -> int:
    """How many leading stages give identical results in both models for a text of `tokens`.

    That holds for stages that are the same objects, if the text's tokens have the same embeddings.
    """
    if a is b:
        return a.poe_n_stages
    if not _same_embeddings(a.wte, b.wte, tokens):
        return 0
    alike = 0
    for one, other in zip(a.stages, b.stages, strict=False):
        if one is not other:
            break
        alike += 1
    return alike


def _same_embeddings(a: nn.Module, b: nn.Module, tokens: Iterable[int]) -> bool:
    if a is b:
        return True
    patched = {row for table in (a, b) if isinstance(table, PatchedEmbedding) for row in table.rows}
    used = sorted(patched & set(tokens))
    return not used or bool(mx.array_equal(a(mx.array([used])), b(mx.array([used]))).item())
