"""A model on several machines compared with the same model on one.

- in: the model, split over ranks, and the whole of it on rank 0, with the same weights
- out: the speedup, next to the ceiling that follows from the times of the parts
- a rank may be a machine, or one core of this machine
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from cognica_mlx.bench.sections.stage_speeds import ROWS, Figure, figure
from cognica_mlx.bench.timing import Samples, first_and_next, interleaved
from cognica_mlx.config import PoEConfig
from cognica_mlx.decoding.drafters import StageDrafter
from cognica_mlx.decoding.modes import ModeOptions, make_mode
from cognica_mlx.decoding.requests import advance
from cognica_mlx.decoding.sequence import Mode, read_prompt, step_size_for
from cognica_mlx.decoding.single import Single, carry_out, decode, prefill
from cognica_mlx.decoding.speculative import Speculative
from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.machines.placement import Part
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.costs import Costs
from cognica_mlx.pricing.measuring import Progress
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


@dataclass(frozen=True)
class Machines:
    """A model on several machines and the whole of it here; `ranks` has the owner of each stage."""

    split: PoEModel
    whole: PoEModel
    ranks: Sequence[int]
    text: Sequence[int]
    tokens: int
    trials: int
    progress: Progress | None = None

    def prompts(self) -> list[Figure]:
        """Read a prompt in a pipeline."""
        parts: list[list[float]] = []
        chunk = step_size_for(self.split)

        def one() -> float:
            parts.append(_stage_seconds(self.whole, self.text, chunk))
            return sum(parts[-1])

        cases = {"one machine": one, "a pipeline": lambda: _pipeline_seconds(self.split, self.text)}
        taken = interleaved(cases, self.trials, self.progress, "a prompt")
        each = _by_rank(np.median(parts[1:], axis=0).tolist(), self.ranks)
        chunks = -(-len(self.text) // chunk)
        # The slowest rank works all the time; the others add one chunk each, before or after it.
        ceiling = sum(each) / (max(each) + (sum(each) - max(each)) / chunks)
        return self._figures(f"prompt of {len(self.text)} tokens", taken, ceiling)

    def siblings(self) -> list[Figure]:
        """Decode specialists pooled from separate ranks."""
        parts: list[Costs] = []

        def alone() -> float:
            parts.append(measure(self.whole, (1,), text=self.text, trials=1))
            return self._token_seconds(self.whole)

        cases = {"one machine": alone, "side by side": lambda: self._token_seconds(self.split)}
        taken = interleaved(cases, self.trials, self.progress, "siblings")
        trunk, stages = len(self.whole.config.stage_layers), range(self.whole.poe_n_stages)
        times = np.median(
            [[c.stage(k) + (k >= trunk) * c.head(k) for k in stages] for c in parts], axis=0
        )
        base, special = times[:trunk].sum(), times[trunk:]
        side_by_side = max(_by_rank(special.tolist(), self.ranks[trunk:]))
        ceiling = float((base + special.sum()) / (base + side_by_side))
        return self._figures(f"a token of {len(special)} specialists", taken, ceiling)

    def speculation(self, agreement: float) -> list[Figure]:
        """Self-speculation while other machines verify, compared with one machine's best mode.

        The text is planted, so that drafts are accepted at the rate `agreement`. The costs of the
        parts decide how many drafts a round has.
        """
        costs: list[Costs] = []
        state = DecodingState(self.whole)
        prefill(state, self.text, state.depth)
        options = ModeOptions(draft_stage=0, num_draft_tokens=MOST_DRAFTS)

        def measure_parts() -> None:
            costs.append(measure(self.whole, ROWS, state=state, trials=1))

        def drafting(model: PoEModel) -> float:
            mode = make_mode(model, "speculative", options)
            return self._token_seconds(model, mode, pace_for(model, mode, costs[-1]))

        cases = {
            "one machine": lambda: self._token_seconds(self.whole),
            "one machine, drafting": lambda: drafting(self.whole),
            "drafting meanwhile": lambda: drafting(self.split),
        }
        taken = interleaved(cases, self.trials, self.progress, "speculation", measure_parts)
        *alone, together = cases
        best, slower = sorted(alone, key=lambda name: taken[name].median)
        mode = make_mode(self.whole, "speculative", options)
        assert isinstance(mode, Speculative)
        gains = [_gain_meanwhile(one, mode.drafters, agreement) for one in costs[1:]]
        ceiling = float(np.median(gains))
        pair = {best: taken[best], together: taken[together]}
        return [
            figure("machines", f"a token, {slower}", "s", taken[slower], baseline=taken[best]),
            *self._figures("a token by speculation", pair, ceiling),
        ]

    def _figures(self, what: str, taken: dict[str, Samples], ceiling: float) -> list[Figure]:
        """The figures of one machine and of all, with their ceiling."""
        one, many = taken
        speedup = taken[one].over(taken[many])
        name = f"{what}, {many} of {len(set(self.ranks))} machines"
        notes = {"of_ceiling": speedup / ceiling}
        more: dict[str, Any] = {"speedup": speedup, "predicted": ceiling, "notes": notes}
        return [
            figure("machines", f"{what}, {one}", "s", taken[one], speedup=1.0),
            figure("machines", name, "s", taken[many], **more),
        ]

    def _token_seconds(
        self, model: PoEModel, mode: Mode | None = None, pace: Pace | None = None
    ) -> float:
        """Seconds per token after the first, in a mode or at full depth."""
        mode = mode or make_mode(model)
        options: dict[str, Any] = {"max_tokens": self.tokens + 1, "advice": pace}
        driver = Metered(Single(), pace) if pace else None
        return first_and_next(decode(model, self.text, mode, driver=driver, **options))[1]


def _by_rank(by_stage: Sequence[float], ranks: Sequence[int]) -> list[float]:
    totals: defaultdict[int, float] = defaultdict(float)
    for seconds, owner in zip(by_stage, ranks, strict=True):
        totals[owner] += seconds
    return [*totals.values()]


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
    return [float(time) for time in times]


def _gain_meanwhile(costs: Costs, drafters: Sequence[StageDrafter], agreement: float) -> float:
    """The speedup of drafting while others verify over one machine's better mode, by costs."""
    alone, meanwhile = (
        RoundCosts(costs, drafters).best(0, 0, MOST_DRAFTS, [agreement], meanwhile)[1]
        for meanwhile in (False, True)
    )
    return min(costs.full_token, alone) / meanwhile
