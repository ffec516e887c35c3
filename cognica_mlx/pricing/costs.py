"""The cost of each part of a decoding step: each stage and each head, by number of rows.

- in bytes of weights read, which bound decoding; the same for a batch of rows as for one row
- or in seconds on this machine, measured by `timed_costs`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.nn as nn
import numpy as np
from mlx.utils import tree_reduce

from cognica_mlx.decoding.quantized_prefix import QuantizedPrefix
from cognica_mlx.decoding.targets import Target
from cognica_mlx.network.model import PoEModel
from cognica_mlx.network.stages import Block


@dataclass(frozen=True)
class Costs:
    """Costs of a batch of `rows[i]` positions: stages[k][i] for stage k's layers, heads[k][i] for
    stage k's prediction. Costs for other numbers of rows are interpolated linearly.

    `full_boundaries` are the stages that the full model's prediction reads. `rounded` has the costs
    of a quantized copy that drafts: its own stages, and its prediction as a single head.
    """

    rows: tuple[int, ...]
    stages: tuple[tuple[float, ...], ...]
    heads: tuple[tuple[float, ...], ...]
    full_boundaries: tuple[int, ...]
    rounded: Costs | None = None

    def stage(self, stage: int, rows: int = 1) -> float:
        """Cost of a batch through the layers of `stage`."""
        return self._at(self.stages[stage], rows)

    def head(self, stage: int, rows: int = 1) -> float:
        """Cost of the prediction of `stage` for a batch."""
        return self._at(self.heads[stage], rows)

    def full_head(self, rows: int = 1) -> float:
        """Cost of the full model's prediction for a batch, without its layers."""
        return sum(self.head(k, rows) for k in self.full_boundaries)

    def upper(self, stage: int, rows: int = 1) -> float:
        """Cost of a batch through all layers after `stage` and the full model's head."""
        return self.between(stage, rows) + self.full_head(rows)

    def between(self, stage: int, rows: int = 1) -> float:
        """Cost of a batch through all layers after `stage`."""
        return sum(self.stage(k, rows) for k in range(stage + 1, len(self.stages)))

    def lower(self, stage: int, rows: int = 1) -> float:
        """Cost of a batch through all layers up to `stage`."""
        return sum(self.stage(k, rows) for k in range(stage + 1))

    def target(self, target: Target, rows: int = 1) -> float:
        """Cost of a target's prediction for a batch."""
        return sum(self.head(k, rows) for k in target.heads)

    def full_pass(self, rows: int = 1) -> float:
        """Cost of a batch at full depth."""
        return self.lower(len(self.stages) - 1, rows) + self.full_head(rows)

    @property
    def full_token(self) -> float:
        """Cost of one token at full depth."""
        return self.full_pass()

    def _at(self, costs: Sequence[float], rows: int) -> float:
        if rows > self.rows[-1] and len(self.rows) > 1:
            slope = (costs[-1] - costs[-2]) / (self.rows[-1] - self.rows[-2])
            return costs[-1] + max(slope, 0) * (rows - self.rows[-1])
        return float(np.interp(rows, self.rows, costs))


def bytes_read(model: PoEModel) -> Costs:
    """Costs in bytes of weights, from the model's own arrays."""
    stages, heads = [], []
    for stage in range(model.poe_n_stages):
        stages.append((float(sum(map(_streamed, model.stages[stage].blocks))),))
        heads.append((float(sum(map(nbytes, model.heads(stage)))),))
    return Costs((1,), tuple(stages), tuple(heads), model.full_boundaries)


def with_bytes_of(costs: Costs, prefix: QuantizedPrefix) -> Costs:
    """`costs` with an estimate for a quantized copy that was not measured: each part's cost is the
    model's, scaled by its share of the bytes."""

    def share(copies: Sequence[nn.Module], originals: Sequence[nn.Module]) -> float:
        return sum(map(_streamed, copies)) / sum(map(_streamed, originals))

    stages = []
    for stage, of in zip(prefix.stages, prefix.of, strict=True):
        part = share(stage.blocks, prefix.model.stages[of].blocks)
        stages.append(tuple(part * cost for cost in costs.stages[of]))
    part = share(prefix.heads, prefix.originals)
    heads = [costs.target(prefix.target, rows) for rows in costs.rows]
    made = Costs(costs.rows, tuple(stages), (tuple(part * head for head in heads),), (0,))
    return replace(costs, rounded=made)


def _streamed(module: nn.Module) -> int:
    """Bytes of a module that a pass reads; embedding tables, read one row a token, are left out."""
    table = module.attn.get("value_embed") if isinstance(module, Block) else None
    return nbytes(module) - (nbytes(table) if table else 0)


def nbytes(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return int(tree_reduce(lambda total, array: total + array.nbytes, module.parameters(), 0))
