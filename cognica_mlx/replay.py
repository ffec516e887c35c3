"""What a decoding mode would have cost: replaying its decisions over recorded predictions.

- in: what every stage predicted at each position of a text that the full model wrote itself
- out: the tokens, the work and the acceptance that a mode would have had there; exact for greedy
  decoding, because along such a text a draft is right just where the stage agrees with it
- costs are bytes of weights: decoding is bound by reading them, and a batch reads them once
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import mlx.nn as nn
import numpy as np
from mlx.utils import tree_reduce

from cognica_mlx.config import SUMMED
from cognica_mlx.model import PoEModel

DRAFT_LENGTHS = range(1, 9)
# Attention over more than a few query rows has a cliff on Metal, so short drafts are advised.
ADVISED_LENGTHS = range(1, 5)
ADVISED_MARGINS = (None, 0.3, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Costs:
    """Bytes of weights that one pass reads: through each stage, through its predictor's heads,
    through the heads that it drafts with, and through the full model's heads."""

    stages: tuple[int, ...]
    heads: tuple[int, ...]
    draft_heads: tuple[int, ...]
    full_head: int

    @classmethod
    def of(cls, model: PoEModel) -> Costs:
        """From the model's own arrays."""
        config = model.config
        stages = []
        for stage in range(model.poe_n_stages):
            blocks = [model.h[i] for i in config.stage_range(stage)]
            # Of an embedding table only the token's own row is read.
            tables = [b.attn.value_embed for b in blocks if "value_embed" in b.attn]
            stages.append(sum(map(_nbytes, blocks)) - sum(map(_nbytes, tables)))
        shared = _nbytes(model.lm_head)
        heads = []
        for stage in range(model.poe_n_stages):
            specialist = stage - len(config.stage_layers)
            own = 0
            if specialist >= 0 and config.head_mode == SUMMED:
                own = _nbytes(model.lm_head_specialists[specialist]) - shared
            elif specialist >= 0:
                own = sum(map(_nbytes, model.lm_head_specialists[: specialist + 1]))
            elif config.per_stage_head:
                own = _nbytes(model.lm_head_stages[stage])
            heads.append(shared + own)
        full_head = sum(heads) if model.pools_stages else heads[-1]
        drafts = [full_head if config.specialist_layers else head for head in heads]
        return cls(tuple(stages), tuple(heads), tuple(drafts), full_head)

    @property
    def full_token(self) -> int:
        """What one token costs at full depth."""
        return sum(self.stages) + self.full_head

    def through(self, stage: int) -> int:
        """The stages up to `stage`, without heads."""
        return sum(self.stages[: stage + 1])


@dataclass(frozen=True)
class Trace:
    """Predictions along one text of T tokens: `hits[k, t]` says whether stage k's best token is the
    full model's, `margins[k, t]` by how much its best score leads; K - 1 stages, full left out.
    draft_hits, draft_margins: the same of what each stage drafts, where that is something else."""

    hits: np.ndarray
    margins: np.ndarray
    draft_hits: np.ndarray
    draft_margins: np.ndarray


@dataclass
class Replay:
    """What a mode did: tokens emitted, bytes read, drafts made and kept, tokens like the full
    model's."""

    tokens: int = 0
    cost: float = 0
    drafted: int = 0
    kept: int = 0
    agreeing: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were kept."""
        return self.kept / max(self.drafted, 1)


def replay_speculative(
    traces: Sequence[Trace], costs: Costs, draft_stage: int, count: int, stop_below: float | None
) -> Replay:
    """Speculation, greedy: see `decoding.speculative`."""
    drafts = [(trace.draft_hits[draft_stage], trace.draft_margins[draft_stage]) for trace in traces]
    head = costs.draft_heads[draft_stage]
    return _replay_drafts(drafts, costs, draft_stage, head, count, stop_below, float("inf"))


def replay_certified(
    traces: Sequence[Trace],
    costs: Costs,
    draft_stage: int,
    count: int,
    stop_below: float | None,
    exit_margins: Sequence[float],
) -> Replay:
    """Certified speculation, greedy: see `decoding.certified`."""
    drafts = [(trace.hits[draft_stage], trace.margins[draft_stage]) for trace in traces]
    head, needed = costs.heads[draft_stage], exit_margins[draft_stage]
    return _replay_drafts(drafts, costs, draft_stage, head, count, stop_below, needed)


def _replay_drafts(
    drafts: Sequence[tuple[np.ndarray, np.ndarray]],
    costs: Costs,
    draft_stage: int,
    head: int,
    count: int,
    stop_below: float | None,
    needed: float,
) -> Replay:
    """Rounds of drafts, given as hits and margins along each text; those above `needed` are
    certified. `head` is what a draft's prediction reads."""
    result = Replay()
    lower = costs.through(draft_stage)
    upper = sum(costs.stages) - lower + costs.full_head
    for hits, margins in drafts:
        at = 0
        while at < len(hits):
            block = margins[at : at + count]
            weak = [i for i, m in enumerate(block) if stop_below is not None and m < stop_below]
            length = weak[0] if weak else len(block)
            # A draft too weak to use has still been made.
            result.cost += (length + bool(weak)) * (lower + head)
            certified = block[:length] > needed
            kept = hits[at : at + length] | certified
            accepted = length if kept.all() else int(kept.argmin())
            result.drafted += length
            result.kept += accepted
            result.agreeing += int(hits[at : at + accepted].sum())
            at += accepted
            result.tokens += accepted
            if weak or not certified.all():
                result.cost += upper + (0 if weak else lower)
                result.tokens += 1
                result.agreeing += 1
                at += 1
    return result


def replay_wand(
    traces: Sequence[Trace],
    costs: Costs,
    exit_margins: Sequence[float],
    exit_stages: Sequence[int],
    pools_stages: bool,
) -> Replay:
    """Adaptive depth: see `decoding.wand`."""
    result = Replay()
    for trace in traces:
        count = trace.hits.shape[1]
        left = np.zeros(count, dtype=bool)
        agrees = np.ones(count, dtype=bool)
        for stage, stage_cost in enumerate(costs.stages):
            reached = count - int(left.sum())
            tested = stage in exit_stages or pools_stages
            result.cost += reached * stage_cost
            if stage == len(costs.stages) - 1:
                head = costs.heads[stage] if pools_stages else costs.full_head
                result.cost += reached * head
            elif tested:
                result.cost += reached * costs.heads[stage]
                leaves = ~left & (trace.margins[stage] > exit_margins[stage])
                agrees[leaves] = trace.hits[stage][leaves]
                left |= leaves
        result.tokens += count
        result.agreeing += int(agrees.sum())
    return result


def best_options(
    traces: Sequence[Trace], costs: Costs, exit_margins: Sequence[float], pools_stages: bool
) -> dict[str, tuple[dict[str, Any], Replay]]:
    """For each mode that drafts or leaves early, the options that emit most tokens for a byte."""
    steps = range(len(exit_margins))
    found: dict[str, list[tuple[dict[str, Any], Replay]]] = {
        "wand": [],
        "speculative": [],
        "certified": [],
    }
    subsets = [c for size in range(1, len(steps) + 1) for c in combinations(steps, size)]
    for exits in [tuple(steps)] if pools_stages else subsets:
        replay = replay_wand(traces, costs, exit_margins, exits, pools_stages)
        found["wand"].append(({"exit_stages": list(exits)}, replay))
    for stage in steps:
        for count in ADVISED_LENGTHS:
            for stop in ADVISED_MARGINS:
                options: dict[str, Any] = {"draft_stage": stage, "num_draft_tokens": count}
                if stop is not None:
                    options["draft_margin"] = stop
                replay = replay_speculative(traces, costs, stage, count, stop)
                found["speculative"].append((options, replay))
                replay = replay_certified(traces, costs, stage, count, stop, exit_margins)
                found["certified"].append((options, replay))
    return {
        mode: min(tried, key=lambda one: one[1].cost / one[1].tokens)
        for mode, tried in found.items()
    }


def _nbytes(module: nn.Module) -> int:
    return tree_reduce(lambda total, array: total + array.nbytes, module.parameters(), 0)
