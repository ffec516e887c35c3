"""The measurements, section by section; each section returns a list of `Figure`.

- in: a model, texts, the machine
- out: figures with their spread, the limit set by memory bandwidth, and the prediction from a
  mode's measured parts
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import mlx.core as mx

from cognica_mlx.bench.machine_card import Machine
from cognica_mlx.bench.shapes import rounded
from cognica_mlx.bench.timing import Progress, Samples, interleaved
from cognica_mlx.decoding.modes import ModeOptions, make_mode
from cognica_mlx.decoding.requests import DecodedToken
from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.decoding.single import Driver, decode, drive, prefill, set_depth
from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.costs import Costs, bytes_read, nbytes
from cognica_mlx.pricing.timed_costs import measure

ROWS = (1, 2, 3, 4, 5, 6, 8, 16)


@dataclass(frozen=True)
class Figure:
    """One measured number.

    value: the median, between the quartiles low and high. speedup: speed relative to the section's
    baseline, trial by trial. limit: the best that the machine's memory bandwidth allows, in the
    same unit. predicted: the speedup predicted from parts measured in the same trials.
    """

    section: str
    name: str
    unit: str
    value: float
    low: float
    high: float
    speedup: float | None = None
    limit: float | None = None
    predicted: float | None = None
    notes: dict[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """The inputs that all sections need. texts: token ids to start from, `context` tokens each."""

    model: PoEModel
    machine: Machine
    texts: Sequence[Sequence[int]]
    tokens: int
    trials: int
    progress: Progress | None = None

    def text(self, count: int) -> list[int]:
        """The first text, repeated to a length of `count` tokens."""
        text = list(self.texts[0])
        return (text * (count // len(text) + 1))[:count]

    def state(self, depth: int, text: Sequence[int]) -> DecodingState:
        """A state that holds `text` without its last token, up to stage `depth`."""
        state = DecodingState(self.model)
        set_depth(state, depth)
        prefill(state, text[:-1], depth)
        return state


def stage_name(stage: int) -> str:
    """The stage's name, with our number and the paper's."""
    return f"stage {stage} (paper: Stage {stage + 1})"


def stages(setup: Setup) -> list[Figure]:
    """A token's latency at each stage cut-off and at full depth."""
    model, text = setup.model, setup.texts[0]
    last = model.poe_n_stages - 1
    cuts: dict[str, tuple[str, dict[str, int]]] = {
        stage_name(k): ("stage", {"stage": k}) for k in range(last)
    }
    cuts["full stack"] = ("full", {})
    depths = dict(zip(cuts, range(last + 1), strict=True))
    # A state of the text for each depth, kept for all trials.
    held = {name: setup.state(depths[name], text) for name in cuts}
    taken = interleaved(
        {
            name: partial(_per_token, setup, mode, options, held[name], text)
            for name, (mode, options) in cuts.items()
        },
        setup.trials,
        setup.progress,
        "stage cut-offs",
    )
    return [
        _latency(
            setup,
            "stages",
            name,
            taken[name],
            taken["full stack"],
            read_per_token(model, depths[name], len(text), full=name == "full stack"),
        )
        for name in cuts
    ]


def lengths(setup: Setup, counts: Sequence[int]) -> list[Figure]:
    """A token's latency at full depth and at stage 0, after texts of `counts` tokens."""
    model, longest = setup.model, setup.text(max(counts))
    last = model.poe_n_stages - 1
    state, cases, sizes = DecodingState(model), {}, {}
    for i, count in enumerate(sorted(counts)):
        prefill(state, longest[state.length : count - 1], last)
        sizes[count] = state.nbytes
        if setup.progress:
            setup.progress("reading", i + 1, len(counts))
        for mode, options in (("full", {}), ("stage", {"stage": 0})):
            cases[mode, count] = partial(
                _per_token, setup, mode, options, state.fork(), longest[:count]
            )
    named = {f"{mode} {count}": run for (mode, count), run in cases.items()}
    taken = interleaved(named, setup.trials, setup.progress, "text lengths")
    least = min(counts)
    return [
        _latency(
            setup,
            "lengths",
            f"{'full stack' if mode == 'full' else stage_name(0)} at {count} tokens",
            taken[f"{mode} {count}"],
            taken[f"{mode} {least}"],
            read_per_token(model, last if mode == "full" else 0, count, full=mode == "full"),
            {"state_mb": sizes[count] / 1e6},
        )
        for mode, count in cases
    ]


def rows(setup: Setup) -> list[Figure]:
    """The cost of a batch of rows: through the full stack, and to verify drafts of stage 0."""
    model, text = setup.model, setup.texts[0]
    state = setup.state(model.poe_n_stages - 1, text)
    found: list[Costs] = []
    for trial in range(setup.trials):
        found.append(measure(model, ROWS, state=state, trials=1))
        if setup.progress:
            setup.progress("batches of rows", trial + 1, setup.trials)
    figures = []
    for name, cost in (
        ("full stack", lambda c, n: c.lower(model.poe_n_stages - 1, n) + c.full_head(n)),
        ("verification behind stage 0", lambda c, n: c.upper(0, n)),
        ("stage 0 without head", lambda c, n: c.stage(0, n)),
        ("full model's head", lambda c, n: c.full_head(n)),
    ):
        one = Samples(tuple(1e3 * cost(c, 1) for c in found))
        for count in ROWS:
            many = Samples(tuple(1e3 * cost(c, count) for c in found))
            note: dict[str, float | str] = {"rows": float(count), "times_one_row": many.over(one)}
            figures.append(
                figure("rows", f"{name}, {count} row{'s' * (count > 1)}", "ms", many, notes=note)
            )
    return figures


def prompts(setup: Setup, count: int) -> list[Figure]:
    """Reading a prompt of `count` tokens: tokens per second, and the time to the first token."""
    model, text = setup.model, setup.text(count)
    cases = {"full stack": ("full", {}), stage_name(0): ("stage", {"stage": 0})}
    taken = interleaved(
        {
            name: partial(_first_token, model, mode, options, text)
            for name, (mode, options) in cases.items()
        },
        setup.trials,
        setup.progress,
        "prompts",
    )
    figures = []
    for name, samples in taken.items():
        speed = Samples(tuple(count / seconds for seconds in samples.values))
        speedup = taken["full stack"].over(samples)
        figures.append(
            figure("prompt", f"{name}, {count} tokens", "tokens/s", speed, speedup=speedup)
        )
        to_first = Samples(tuple(1e3 * seconds for seconds in samples.values))
        figures.append(
            figure("prompt", f"{name}, time to first token", "ms", to_first, speedup=speedup)
        )
    return figures


def quantised(setup: Setup, bits: Sequence[int]) -> list[Figure]:
    """A token's latency at full depth and stage 0, with matrices of `bits` bits each."""
    model, text, last = setup.model, setup.texts[0], setup.model.poe_n_stages - 1
    setups = {"as it is": setup}
    setups.update({f"{n} bits": replace(setup, model=rounded(model, n)) for n in bits})
    cuts = {"full stack": ("full", last, {}), stage_name(0): ("stage", 0, {"stage": 0})}
    taken = interleaved(
        {
            f"{cut}, {label}": partial(_per_token, one, mode, options, one.state(depth, text), text)
            for label, one in setups.items()
            for cut, (mode, depth, options) in cuts.items()
        },
        setup.trials,
        setup.progress,
        "quantised",
    )
    baseline = taken["full stack, as it is"]
    return [
        _latency(
            one,
            "quantised",
            f"{cut}, {label}",
            taken[f"{cut}, {label}"],
            baseline,
            read_per_token(one.model, depth, len(text), full=depth == last),
        )
        for label, one in setups.items()
        for cut, (_, depth, _) in cuts.items()
    ]


def memory(setup: Setup, count: int) -> list[Figure]:
    """Memory of the weights, the decoding state and a whole run at its peak, in GB."""
    model = setup.model
    weights = nbytes(model)
    mx.clear_cache()
    mx.reset_peak_memory()
    state = DecodingState(model)
    for _ in decode(model, setup.text(count), make_mode(model), max_tokens=4, state=state):
        pass
    peak = mx.get_peak_memory()
    sizes = {
        "weights": weights,
        f"state behind {count} tokens": state.nbytes,
        f"most held while reading {count} tokens": peak,
    }
    return [
        figure(
            "memory",
            name,
            "GB",
            Samples((size / 1e9,)),
            notes={"of_weights": size / weights},
        )
        for name, size in sizes.items()
    ]


def read_per_token(model: PoEModel, stage: int, context: int, *, full: bool) -> int:
    """Bytes of weights, keys and values read for one token at `stage` after `context` tokens."""
    config, costs = model.config, bytes_read(model)
    weights = costs.lower(stage) + (costs.full_head() if full else costs.head(stage))
    seen = sum(min(context, w + 1) for w in config.windows[: config.stage_range(stage)[-1] + 1])
    size = model.resid_lambdas.dtype.size
    return int(weights) + 2 * seen * config.n_kv_head * config.head_dim * size


def timed_decode(
    sequence: DecodingSequence, driver: Driver | None = None
) -> tuple[float, list[DecodedToken]]:
    """The seconds that a sequence took, and its tokens."""
    started = time.perf_counter()
    decoded = list(drive(sequence.steps(), driver))
    return time.perf_counter() - started, decoded


def _per_token(
    setup: Setup, mode: str, options: dict, state: DecodingState, text: Sequence[int]
) -> float:
    model = setup.model
    chosen = make_mode(model, mode, ModeOptions(**options))
    seconds, decoded = timed_decode(
        DecodingSequence(model, text, chosen, max_tokens=setup.tokens, state=state)
    )
    return 1e3 * seconds / len(decoded)


def _first_token(model: PoEModel, mode: str, options: dict, text: Sequence[int]) -> float:
    chosen = make_mode(model, mode, ModeOptions(**options))
    started = time.perf_counter()
    next(decode(model, text, chosen, max_tokens=1))
    return time.perf_counter() - started


def _latency(
    setup: Setup,
    section: str,
    name: str,
    samples: Samples,
    baseline: Samples,
    read: int,
    notes: dict[str, float | str] | None = None,
) -> Figure:
    return figure(
        section,
        name,
        "ms/token",
        samples,
        speedup=baseline.over(samples),
        limit=1e3 * read / setup.machine.bandwidth,
        notes={"read_mb": read / 1e6, **(notes or {})},
    )


def figure(
    section: str,
    name: str,
    unit: str,
    samples: Samples,
    *,
    speedup: float | None = None,
    limit: float | None = None,
    predicted: float | None = None,
    notes: dict[str, float | str] | None = None,
) -> Figure:
    """A figure from its trials."""
    low, high = samples.spread
    return Figure(
        section, name, unit, samples.median, low, high, speedup, limit, predicted, notes or {}
    )
