"""What a decoding mode would have cost: replays its decisions over recorded predictions.

- in: every stage's predictions at each position of a text that the full model generated
- out: the tokens, the cost and the acceptance that a mode would have had there; exact for greedy
  decoding, because on such a text a draft is right exactly where the stage agrees with it
- costs are bytes of weights, or measured seconds
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from cognica_mlx.decoding.advice import Plan
from cognica_mlx.decoding.drafters import StageDrafter
from cognica_mlx.decoding.quantized_prefix import QuantizedPrefix, quantize_prefix
from cognica_mlx.decoding.targets import draft_target
from cognica_mlx.errors import RequestError
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.costs import Costs
from cognica_mlx.pricing.rounds import RoundCosts
from cognica_mlx.scheme import draft_scheme

DRAFT_LENGTHS = range(1, 9)
# Attention over more than a few query rows has a cliff on Metal, so short drafts are advised.
ADVISED_LENGTHS = range(1, 5)
MEASURED_LENGTHS = (1, 2, 3, 4, 6, 8, 12)
# The bits of a quantized copy: with fewer it drafts worse, with more it costs more.
COPY_BITS = 4
# A quantized copy is cheap, so its rounds may be longer.
COPY_LENGTHS = range(1, 9)
# The bounds are cautious; a smaller factor is advised if it keeps MIN_AGREEMENT.
SAFETIES = (1.0, 0.75, 0.5)
MIN_AGREEMENT = 0.998


@dataclass(frozen=True)
class Trace:
    """Predictions along one text of T tokens: `hits[k, t]` says whether stage k's best token is the
    full model's, `margins[k, t]` by how much its best score leads; K - 1 stages, without the last.
    draft_hits: the same for each stage's drafts, which may differ. copy_hits (T,): for the drafts
    of a copy of stage 0 quantized to `COPY_BITS`, if there is one."""

    hits: np.ndarray
    margins: np.ndarray
    draft_hits: np.ndarray
    copy_hits: np.ndarray | None = None


@dataclass
class Replay:
    """A mode's results: tokens emitted, their cost, drafts made and accepted, and tokens that agree
    with the full model's."""

    tokens: int = 0
    cost: float = 0
    drafted: int = 0
    kept: int = 0
    agreeing: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were accepted."""
        return self.kept / max(self.drafted, 1)


def replay_drafts(hits: Sequence[np.ndarray], rounds: RoundCosts, count: int) -> Replay:
    """Greedy speculation: see `decoding.speculative`. hits (T,) are those of the drafts along each
    text; `rounds` has the costs of their drafter."""
    result = Replay()
    for row in hits:
        at = 0
        while at < len(row):
            block = row[at : at + count]
            accepted = len(block) if block.all() else int(block.argmin())
            result.cost += rounds.cost(Plan(count=len(block)))
            result.drafted += len(block)
            result.kept += accepted
            at += accepted + 1
            result.tokens += accepted + 1
    result.agreeing = result.tokens
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
    last = len(costs.stages) - 1
    for trace in traces:
        count = trace.hits.shape[1]
        waiting = [0] * (last + 1)
        for t in range(count):
            for stage in range(last + 1):
                result.cost += costs.stage(stage, waiting[stage] + 1)
                waiting[stage] = 0
                if stage == last:
                    result.cost += costs.head(stage) if pools_stages else costs.full_head()
                    result.agreeing += 1
                    break
                tested = stage in exit_stages
                if tested or pools_stages:
                    result.cost += costs.head(stage)
                if tested and trace.margins[stage, t] > exit_margins[stage]:
                    result.agreeing += int(trace.hits[stage, t])
                    waiting[stage + 1] += 1
                    break
        result.tokens += count
    return result


def best_options(
    model: PoEModel, traces: Sequence[Trace], costs: Costs, exit_margins: Sequence[float]
) -> dict[str, tuple[dict[str, Any], Replay]]:
    """For each mode that drafts or exits early, the options with the lowest cost per token.

    `exit_margins` are those at safety 1; a lower safety is advised if WAND's tokens still agree
    with the full model's in at least `MIN_AGREEMENT` of the text.
    """
    steps = range(len(exit_margins))
    pools_stages = model.pools_stages
    found: dict[str, list[tuple[dict[str, Any], Replay]]] = {"wand": [], "speculative": []}
    subsets = [c for size in range(1, len(steps) + 1) for c in combinations(steps, size)]
    for exits in [tuple(steps)] if pools_stages else subsets:
        for safety in SAFETIES:
            needed = [safety * margin for margin in exit_margins]
            replay = replay_wand(traces, costs, needed, exits, pools_stages)
            if safety == 1 or replay.agreeing >= MIN_AGREEMENT * replay.tokens:
                found["wand"].append(({"exit_stages": list(exits), "safety": safety}, replay))
    # Measured costs show the cliff, so longer drafts can be considered.
    lengths = ADVISED_LENGTHS if len(costs.rows) == 1 else MEASURED_LENGTHS

    def consider(
        options: dict[str, Any], drafter: StageDrafter, hits: list[Any], lengths: Sequence[int]
    ) -> None:
        rounds = RoundCosts(costs, [drafter])
        for count in lengths:
            replay = replay_drafts(hits, rounds, count)
            found["speculative"].append(({**options, "num_draft_tokens": count}, replay))

    for stage in steps:
        hits = [trace.draft_hits[stage] for trace in traces]
        drafter = StageDrafter(draft_target(model, stage, "summed"))
        consider({"draft_stage": stage}, drafter, hits, lengths)
    copied = [trace.copy_hits for trace in traces if trace.copy_hits is not None]
    if costs.rounded and len(copied) == len(traces) and (prefix := recorded_prefix(model)):
        # Nearly exact: the recorded drafts saw the copy's own keys, while real drafts see the
        # model's.
        options = {"draft_bits": COPY_BITS, "draft_stage": 0}
        consider(options, StageDrafter(prefix.target, prefix), copied, COPY_LENGTHS)
    return {
        mode: min(tried, key=lambda one: one[1].cost / one[1].tokens)
        for mode, tried in found.items()
    }


def recorded_prefix(model: PoEModel) -> QuantizedPrefix | None:
    """A quantized copy of stage 0 to draft with; None if quantizing would change nothing."""
    try:
        return quantize_prefix(model, draft_scheme(COPY_BITS), 0, "summed")
    except RequestError:
        return None
