"""What a decoding mode would have cost: replays its decisions over recorded predictions.

- in: every stage's predictions at each position of a text that the full model generated
- out: the tokens, the cost and the acceptance that a mode would have had there; exact for greedy
  decoding, because on such a text a draft is right exactly where the stage agrees with it
- costs are bytes of weights, or measured seconds
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np

from cognica_mlx.decoding.targets import draft_target
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.costs import Costs

DRAFT_LENGTHS = range(1, 9)
# Attention over more than a few query rows has a cliff on Metal, so short drafts are advised.
ADVISED_LENGTHS = range(1, 5)
MEASURED_LENGTHS = (1, 2, 3, 4, 6, 8, 12)
# The bits of a rounded drafter: with fewer it drafts worse, with more it costs more.
ROUNDED_BITS = 4
# A rounded drafter is cheap, so its rounds may be longer.
ROUNDED_LENGTHS = range(1, 9)
# Candidates for the margin below which drafting stops: percentiles of the draft stage's margins.
STOP_PERCENTILES = (5, 10, 15, 20, 30)
# The bounds are cautious; a smaller factor is advised if it keeps MIN_AGREEMENT.
SAFETIES = (1.0, 0.75, 0.5)
MIN_AGREEMENT = 0.998


@dataclass(frozen=True)
class Trace:
    """Predictions along one text of T tokens: `hits[k, t]` says whether stage k's best token is the
    full model's, `margins[k, t]` by how much its best score leads; K - 1 stages, without the last.
    draft_hits, draft_margins: the same for each stage's drafts, if they differ. rounded_hits (T,):
    for the drafts of a copy of stage 0 rounded to `ROUNDED_BITS`, if there is one."""

    hits: np.ndarray
    margins: np.ndarray
    draft_hits: np.ndarray
    draft_margins: np.ndarray
    rounded_hits: np.ndarray | None = None


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


def replay_speculative(
    traces: Sequence[Trace],
    costs: Costs,
    draft_stage: int,
    count: int,
    stop_below: float | None,
    head: float,
) -> Replay:
    """Greedy speculation: see `decoding.speculative`. `head` is the cost of predicting a draft."""
    drafts = [(trace.draft_hits[draft_stage], trace.draft_margins[draft_stage]) for trace in traces]
    return _replay_drafts(drafts, costs, draft_stage, head, count, stop_below, float("inf"))


def replay_rounded(traces: Sequence[Trace], costs: Costs, count: int) -> Replay:
    """Greedy speculation with a rounded copy of stage 0. Nearly exact: the recorded drafts saw the
    copy's own keys, while real drafts see the model's."""
    result, own = Replay(), costs.rounded
    assert own is not None, "costs of a rounded drafter are missing"
    for trace in traces:
        hits, at = trace.rounded_hits, 0
        assert hits is not None, "recorded without a rounded drafter"
        while at < len(hits):
            block = hits[at : at + count]
            accepted = len(block) if block.all() else int(block.argmin())
            result.cost += len(block) * (own.lower(len(own.stages) - 1) + own.full_head())
            result.cost += costs.full_pass(len(block) + 1)
            result.drafted += len(block)
            result.kept += accepted
            at += accepted + 1
            result.tokens += accepted + 1
            result.agreeing += accepted + 1
    return result


def replay_certified(
    traces: Sequence[Trace],
    costs: Costs,
    draft_stage: int,
    count: int,
    stop_below: float | None,
    exit_margins: Sequence[float],
    head: float,
) -> Replay:
    """Greedy certified speculation: see `decoding.speculative`."""
    drafts = [(trace.hits[draft_stage], trace.margins[draft_stage]) for trace in traces]
    needed = exit_margins[draft_stage]
    return _replay_drafts(drafts, costs, draft_stage, head, count, stop_below, needed)


def _replay_drafts(
    drafts: Sequence[tuple[np.ndarray, np.ndarray]],
    costs: Costs,
    draft_stage: int,
    head: float,
    count: int,
    stop_below: float | None,
    needed: float,
) -> Replay:
    """Rounds of drafts, given as hits and margins along each text; drafts with a margin above
    `needed` are certified. `head` is the cost of a draft's prediction."""
    result = Replay()
    lower = costs.lower(draft_stage)
    for hits, margins in drafts:
        at, waiting = 0, 0
        while at < len(hits):
            block = margins[at : at + count]
            weak = [i for i, m in enumerate(block) if stop_below is not None and m < stop_below]
            length = weak[0] if weak else len(block)
            # A draft too weak to use still costs as much.
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
                result.cost += costs.upper(draft_stage, waiting + length + 1)
                result.cost += 0 if weak else lower
                result.tokens += 1
                result.agreeing += 1
                at += 1
                waiting = 0
            else:
                waiting += length
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
    model: PoEModel,
    traces: Sequence[Trace],
    costs: Costs,
    exit_margins: Sequence[float],
) -> dict[str, tuple[dict[str, Any], Replay]]:
    """For each mode that drafts or exits early, the options with the lowest cost per token.

    `exit_margins` are those at safety 1; a lower safety is advised if WAND's tokens still agree
    with the full model's in at least `MIN_AGREEMENT` of the text.
    """
    steps = range(len(exit_margins))
    pools_stages = model.pools_stages
    # Measured costs show the cliff, so longer drafts can be considered.
    lengths = ADVISED_LENGTHS if len(costs.rows) == 1 else MEASURED_LENGTHS
    needed = {safety: [safety * margin for margin in exit_margins] for safety in SAFETIES}
    found: dict[str, list[tuple[dict[str, Any], Replay]]] = {
        "wand": [],
        "speculative": [],
        "certified": [],
    }

    def consider(mode: str, options: dict[str, Any], replay: Replay) -> None:
        cautious = options.get("safety", 1.0) == 1
        if cautious or replay.agreeing >= MIN_AGREEMENT * replay.tokens:
            found[mode].append((options, replay))

    subsets = [c for size in range(1, len(steps) + 1) for c in combinations(steps, size)]
    for exits in [tuple(steps)] if pools_stages else subsets:
        for safety in SAFETIES:
            replay = replay_wand(traces, costs, needed[safety], exits, pools_stages)
            consider("wand", {"exit_stages": list(exits), "safety": safety}, replay)
    for stage in steps:
        head = costs.target(draft_target(model, stage, "summed"))
        own_head = costs.target(draft_target(model, stage, "base"))
        margins = np.concatenate([trace.draft_margins[stage] for trace in traces])
        stops = np.percentile(margins, STOP_PERCENTILES).round(3).tolist()
        for count, stop in product(lengths, (None, *stops)):
            options: dict[str, Any] = {"draft_stage": stage, "num_draft_tokens": count}
            if stop is not None:
                options["draft_margin"] = stop
            replay = replay_speculative(traces, costs, stage, count, stop, head)
            consider("speculative", options, replay)
            for safety in SAFETIES:
                replay = replay_certified(
                    traces, costs, stage, count, stop, needed[safety], own_head
                )
                consider("certified", {**options, "safety": safety}, replay)
    if costs.rounded and all(trace.rounded_hits is not None for trace in traces):
        for count in ROUNDED_LENGTHS:
            options = {"draft_bits": ROUNDED_BITS, "draft_stage": 0, "num_draft_tokens": count}
            consider("speculative", options, replay_rounded(traces, costs, count))
    return {
        mode: min(tried, key=lambda one: one[1].cost / one[1].tokens)
        for mode, tried in found.items()
    }
