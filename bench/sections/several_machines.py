"""A model on several machines compared with the same model on one.

- in: the model, split over ranks, and the whole of it on rank 0, with the same weights
- out: the speedup, next to the ceiling that follows from the times of the parts
- a rank may be a machine, or one core of this machine
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from cognica_mlx.bench.sections.stage_speeds import ROWS, Figure, figure
from cognica_mlx.bench.timing import Progress, Samples, interleaved
from cognica_mlx.config import PoEConfig
from cognica_mlx.decoding.drafters import StageDrafter
from cognica_mlx.decoding.modes import ModeOptions, make_mode
from cognica_mlx.decoding.requests import advance
from cognica_mlx.decoding.sequence import DecodingSequence, Mode, read_prompt, step_size_for
from cognica_mlx.decoding.single import Single, carry_out, drive, prefill
from cognica_mlx.decoding.speculative import Speculative
from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.machines.placement import Part
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.costs import Costs
from cognica_mlx.pricing.pace import Metered, Pace, pace_for
from cognica_mlx.pricing.rounds import RoundCosts
from cognica_mlx.pricing.timed_costs import measure

# A specialist of the released shape, in layers.
SPECIALIST_LAYERS = 4
MOST_DRAFTS = 8


def part_of(whole: PoEModel, part: Part) -> PoEModel:
    """A part of a model that shares its arrays."""
    model = PoEModel(whole.config)
    part.strip(model)
    held: dict[str, mx.array] = dict(tree_flatten(whole.parameters()))
    model.update(tree_unflatten([(n, a) for n, a in held.items() if part.holds(n)]))
    model.eval()
    return model


def specialist_over(base: PoEConfig) -> tuple[PoEConfig, Part]:
    """The configuration of a specialist over a base, and the part that the specialist adds."""
    count = base.n_layer + SPECIALIST_LAYERS
    config = replace(base, n_layer=count, specialist_layers=(SPECIALIST_LAYERS,))
    layers = frozenset(range(base.n_layer, count))
    return config, Part(layers, False, False, frozenset([0]))


def prompts(
    split: PoEModel,
    whole: PoEModel,
    ranks: Sequence[int],
    text: Sequence[int],
    trials: int,
    progress: Progress | None = None,
) -> list[Figure]:
    """Read a prompt in a pipeline; `ranks` has the owner of each stage."""
    parts: list[list[float]] = []

    chunk = step_size_for(split)

    def one() -> float:
        parts.append(_stage_seconds(whole, text, chunk))
        return sum(parts[-1])

    cases = {"one machine": one, "a pipeline": lambda: _pipeline_seconds(split, text)}
    taken = interleaved(cases, trials, progress, "a prompt")
    by_stage = np.median(parts[1:], axis=0)
    each = _by_rank(by_stage.tolist(), ranks)
    chunks = -(-len(text) // chunk)
    # The slowest rank works all the time; the others add one chunk each, before or after it.
    ceiling = sum(each) / (max(each) + (sum(each) - max(each)) / chunks)
    return _pair(f"prompt of {len(text)} tokens", "s", taken, ceiling, len(each))


def _by_rank(by_stage: Sequence[float], ranks: Sequence[int]) -> list[float]:
    return [
        sum(t for t, owner in zip(by_stage, ranks, strict=True) if owner == rank)
        for rank in sorted(set(ranks))
    ]


def _pair(
    what: str, unit: str, taken: dict[str, Samples], ceiling: float, count: int
) -> list[Figure]:
    """The figures of one machine and of `count` machines, with their ceiling."""
    one, many = taken
    speedup = 1 / taken[many].over(taken[one])
    return [
        figure("machines", f"{what}, {one}", unit, taken[one], speedup=1.0),
        figure(
            "machines",
            f"{what}, {many} of {count} machines",
            unit,
            taken[many],
            speedup=speedup,
            predicted=ceiling,
            notes={"of_ceiling": speedup / ceiling},
        ),
    ]


def _pipeline_seconds(model: PoEModel, text: Sequence[int]) -> float:
    """Seconds until the last position of a text has passed all stages."""
    state, last = DecodingState(model), model.poe_n_stages - 1
    started = time.perf_counter()
    carry_out(read_prompt(state, text, last, step_size_for(model)))
    mx.eval(state.boundary(last, len(text) - 1, len(text)).x)
    return time.perf_counter() - started


def _stage_seconds(model: PoEModel, text: Sequence[int], chunk: int) -> list[float]:
    """Seconds that each stage takes for a text, read in chunks."""
    state = DecodingState(model)
    times = np.zeros(model.poe_n_stages)
    for start in range(0, len(text), chunk):
        state.append(text[start : start + chunk])
        for stage in range(model.poe_n_stages):
            started = time.perf_counter()
            carry_out(advance(state, stage))
            mx.eval(state.arrays())
            times[stage] += time.perf_counter() - started
        state.next_round()
    return times.tolist()


def siblings(
    split: PoEModel,
    whole: PoEModel,
    ranks: Sequence[int],
    text: Sequence[int],
    tokens: int,
    trials: int,
    progress: Progress | None = None,
) -> list[Figure]:
    """Decode specialists pooled from separate ranks; `ranks` has the owner of each stage."""
    parts: list[Costs] = []

    def alone() -> float:
        parts.append(measure(whole, (1,), text=text, trials=1))
        return _token_seconds(whole, text, tokens)

    cases = {"one machine": alone, "side by side": lambda: _token_seconds(split, text, tokens)}
    taken = interleaved(cases, trials, progress, "siblings")
    trunk = len(whole.config.stage_layers)
    stages = range(whole.poe_n_stages)
    times = np.median([[c.stage(k) + (k >= trunk) * c.head(k) for k in stages] for c in parts], 0)
    base, special = times[:trunk].sum(), times[trunk:]
    side_by_side = max(_by_rank(special.tolist(), ranks[trunk:]))
    ceiling = float((base + special.sum()) / (base + side_by_side))
    what = f"a token of {len(special)} specialists"
    return _pair(what, "s", taken, ceiling, len(set(ranks)))


def speculation(
    split: PoEModel,
    whole: PoEModel,
    ranks: Sequence[int],
    text: Sequence[int],
    agreement: float,
    tokens: int,
    trials: int,
    progress: Progress | None = None,
) -> list[Figure]:
    """Self-speculation while other machines verify, compared with one machine's best mode.

    `text` is planted, so that drafts are accepted at the rate `agreement`. The costs of the parts
    decide how many drafts a round has.
    """
    costs: list[Costs] = []
    state = DecodingState(whole)
    prefill(state, text, state.depth)
    options = ModeOptions(draft_stage=0, num_draft_tokens=MOST_DRAFTS)

    def drafts(model: PoEModel) -> Speculative:
        mode = make_mode(model, "speculative", options)
        assert isinstance(mode, Speculative)
        return mode

    def measure_parts() -> None:
        costs.append(measure(whole, ROWS, state=state, trials=1))

    def drafting(model: PoEModel) -> float:
        mode = drafts(model)
        pace = pace_for(model, mode, costs[-1])
        return _token_seconds(model, text, tokens, mode, pace)

    cases = {
        "one machine": lambda: _token_seconds(whole, text, tokens),
        "one machine, drafting": lambda: drafting(whole),
        "drafting meanwhile": lambda: drafting(split),
    }
    taken = interleaved(cases, trials, progress, "speculation", measure_parts)
    *alone, together = cases
    best = min(alone, key=lambda name: taken[name].median)
    drafters = drafts(whole).drafters
    ceiling = float(np.median([_gain_meanwhile(one, drafters, agreement) for one in costs[1:]]))
    pair = _pair(
        "a token by speculation",
        "s",
        {best: taken[best], together: taken[together]},
        ceiling,
        len(set(ranks)),
    )
    slower = (name for name in alone if name != best)
    others = [
        figure(
            "machines",
            f"a token, {name}",
            "s",
            taken[name],
            speedup=1 / taken[name].over(taken[best]),
        )
        for name in slower
    ]
    return [*others, *pair]


def _gain_meanwhile(costs: Costs, drafters: Sequence[StageDrafter], agreement: float) -> float:
    """The speedup of drafting while others verify over one machine's better mode, by costs."""
    alone, meanwhile = (
        RoundCosts(costs, drafters).best(0, 0, MOST_DRAFTS, [agreement], meanwhile)[1]
        for meanwhile in (False, True)
    )
    return min(costs.full_token, alone) / meanwhile


def _token_seconds(
    model: PoEModel,
    text: Sequence[int],
    tokens: int,
    mode: Mode | None = None,
    pace: Pace | None = None,
) -> float:
    """Seconds per token after the first, in a mode or at full depth."""
    sequence = DecodingSequence(
        model, text, mode or make_mode(model), max_tokens=tokens + 1, advice=pace
    )
    steps = drive(sequence.steps(), Metered(Single(), pace) if pace else None)
    next(steps)
    started = time.perf_counter()
    count = sum(1 for _ in steps)
    return (time.perf_counter() - started) / count
