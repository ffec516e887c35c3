"""Specialists over one base in memory: models that share its modules and differ above it.

- in: a base model, a deeper configuration, the arrays that the specialist brings
- out: a model whose lower blocks and heads are the base's own, the very same arrays
- `shared_stages` says how far two such models compute the same for a text, so that a decoding
  state can pass from one to the other
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn

from cognica_mlx.model import PoEModel


class PatchedEmbedding(nn.Module):
    """A shared table of embeddings with a few rows of its own."""

    def __init__(self, table: nn.Module, rows: list[int], values: mx.array, n_rows: int):
        super().__init__()
        self.rows = rows
        self.own = values
        # Private, because the table's parameters are not this module's.
        self._table = table
        # For each token 1 + its place among the values, or 0.
        slots = mx.zeros((n_rows,), mx.int32)
        slots[mx.array(rows)] = mx.arange(1, len(rows) + 1, dtype=mx.int32)
        self._slots = slots

    def __call__(self, tokens: mx.array) -> mx.array:
        slots = self._slots[tokens]
        patch = self.own[mx.maximum(slots - 1, 0)]
        return mx.where((slots > 0)[..., None], patch, self._table(tokens))


def share_base(model: PoEModel, base: PoEModel, rows: list[int], values: mx.array) -> None:
    """Give `model`, whose lower layers are `base`'s, the modules and arrays of `base` itself.

    `rows` are the tokens whose embeddings differ, `values` (n, D) theirs. What `model` has beyond
    the base, its lambdas among it, stays its own.
    """
    config = base.config
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


def shared_stages(a: PoEModel, b: PoEModel, tokens: Iterable[int]) -> int:
    """How many leading stages compute just the same in both models for a text of `tokens`.

    They do where the blocks are the same objects, with the same windows and lambdas, and the
    text's tokens have the same embeddings.
    """
    if a is b:
        return a.poe_n_stages
    if not _same_embeddings(a.wte, b.wte, tokens):
        return 0
    layers = min(a.config.n_layer, b.config.n_layer)
    same = (a.resid_lambdas[:layers] == b.resid_lambdas[:layers]) & (
        a.x0_lambdas[:layers] == b.x0_lambdas[:layers]
    )
    agree = [bool(flag) for flag in same.tolist()]  # type: ignore[union-attr]
    alike = 0
    while (
        alike < layers
        and agree[alike]
        and a.h[alike] is b.h[alike]
        and a.config.windows[alike] == b.config.windows[alike]
    ):
        alike += 1
    ends = zip(a.poe_stage_boundary_layers, b.poe_stage_boundary_layers, strict=False)
    return sum(x == y and x < alike for x, y in ends)


def _same_embeddings(a: nn.Module, b: nn.Module, tokens: Iterable[int]) -> bool:
    if a is b:
        return True
    patched = {row for table in (a, b) if isinstance(table, PatchedEmbedding) for row in table.rows}
    used = sorted(patched & set(tokens))
    return not used or bool(mx.array_equal(a(mx.array([used])), b(mx.array([used]))).item())
