"""What is measured, section by section: each gives a list of `Figure`.

- in: a model, texts, the machine
- out: figures with their spread, the limit that memory bandwidth sets, and what the measured parts
  of a mode predict for it
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_reduce

from cognica_mlx.bench.machine import Machine
from cognica_mlx.bench.scripted import RIGHT, Script
from cognica_mlx.bench.shapes import rounded
from cognica_mlx.bench.timing import Progress, Samples, interleaved
from cognica_mlx.calibration import Calibration
from cognica_mlx.costs import Costs, bytes_read, measure
from cognica_mlx.decoding.loop import DecodedToken, Policy, decode, number
from cognica_mlx.decoding.modes import ModeOptions, make_policy
from cognica_mlx.decoding.pace import Pace
from cognica_mlx.decoding.speculative import Speculative
from cognica_mlx.decoding.wand import exit_margins
from cognica_mlx.model import PoEModel
from cognica_mlx.replay import Trace, best_options
from cognica_mlx.sampling import Sampler
from cognica_mlx.state import DecodingState

ROWS = (1, 2, 3, 4, 5, 6, 8, 16)


@dataclass(frozen=True)
class Figure:
    """One measured number.

    value: the median, between the quartiles low and high. speedup: how many times as fast as the
    section's baseline, trial by trial. limit: the best that the machine's memory bandwidth allows,
    in the same unit. predicted: the speedup that the parts measured in the same trials add up to.
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
    """What all sections need. texts: token ids to start from, each of `context` tokens."""

    model: PoEModel
    machine: Machine
    texts: Sequence[Sequence[int]]
    tokens: int
    trials: int
    progress: Progress | None = None

    def state(self, depth: int, text: Sequence[int]) -> DecodingState:
        """A state that holds all of `text` but its last token, up to stage `depth`."""
        state = DecodingState(self.model)
        state.set_depth(depth)
        state.prefill(text[:-1], depth)
        return state


def stage_name(stage: int) -> str:
    """The stage as we and as the paper count it."""
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
    # Every state is this text at its own depth, kept for all trials.
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
    """A token's latency at full depth and at stage 0 behind texts of so many tokens."""
    model, text = setup.model, setup.texts[0]
    last = model.poe_n_stages - 1
    longest = list(text) * (max(counts) // len(text) + 1)
    state, cases, sizes = DecodingState(model), {}, {}
    for i, count in enumerate(sorted(counts)):
        state.prefill(longest[state.length : count - 1], last)
        at_count = state.fork()
        sizes[count] = state.nbytes
        if setup.progress:
            setup.progress("reading", i + 1, len(counts))
        for mode, options in (("full", {}), ("stage", {"stage": 0})):
            cases[mode, count] = partial(
                _per_token, setup, mode, options, at_count.fork(), longest[:count]
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
    """What a batch of rows costs: the full stack, and what verifies drafts of stage 0."""
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
    """Reading a prompt of `count` tokens: tokens a second, and the time to the first token."""
    model = setup.model
    text = (list(setup.texts[0]) * (count // len(setup.texts[0]) + 1))[:count]
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


@dataclass(frozen=True)
class Recording:
    """How a small trained model drafts: `traces` along its own texts, and its p99 bounds."""

    traces: Sequence[Trace]
    p99_bounds: Sequence[float]


def modes(
    setup: Setup, calibration: Calibration | None, recording: Recording | None = None
) -> list[Figure]:
    """Every decoding mode on the same texts: speed, agreement with the full model, and what the
    parts measured in the same trials predict. With a `recording` drafts are decided as it has it,
    and agreement is the recording's."""
    model = setup.model
    cases = _mode_cases(model, calibration)
    if recording:
        cases.update(_recorded_cases(setup, recording))
    last = model.poe_n_stages - 1
    held = {name: [setup.state(last, text) for text in setup.texts] for name in cases}
    made: dict[str, list[list[DecodedToken]]] = {}
    drafted: dict[str, int] = {}
    predicted: dict[str, list[float]] = {name: [] for name in cases}
    overhead: dict[str, list[float]] = {name: [] for name in cases}
    costs: list[Costs] = []
    spare = setup.state(last, setup.texts[0])

    def measure_parts() -> None:
        costs.append(measure(model, ROWS, state=spare, trials=1))

    def run(name: str) -> float:
        mode, options = cases[name]
        pace = Pace(costs[-1], park=False)
        seconds, made[name], drafted[name] = 0.0, [], 0
        for i, (text, state) in enumerate(zip(setup.texts, held[name], strict=True)):
            policy = make_policy(model, Sampler(), mode, ModeOptions(**options), calibration, pace)
            if recording and isinstance(policy, Speculative):
                trace = recording.traces[i % len(recording.traces)]
                Script(trace, state, len(text)).direct(policy)
            taken, decoded = _decode(model, policy, state, text, setup.tokens)
            seconds += taken
            made[name].append(decoded)
            drafted[name] += policy.drafted
        total = sum(map(len, made[name]))
        if pace.spent:
            predicted[name].append(pace.costs.full_token * total / pace.spent)
            overhead[name].append(seconds / pace.spent - 1)
        return 1e3 * seconds / total

    taken = interleaved(
        {name: partial(run, name) for name in cases},
        setup.trials,
        setup.progress,
        "decoding modes",
        measure_parts,
    )
    figures = []
    for name in cases:
        tokens = [one for text in made[name] for one in text]
        notes: dict[str, float | str] = {
            "agreement": (
                sum(one.token == RIGHT for one in tokens) / len(tokens)
                if recording and drafted[name]
                else _agreement(model, setup.texts, made[name])
            ),
            "mean_depth": sum(one.stage + 1 for one in tokens) / len(tokens),
            "options": ", ".join(f"{k} {v}" for k, v in cases[name][1].items()),
        }
        if drafted[name]:
            notes["acceptance"] = sum(one.from_draft for one in tokens) / drafted[name]
        if overhead[name]:
            notes["over_its_parts"] = Samples(tuple(overhead[name][1:])).median
        figures.append(
            figure(
                "modes",
                name,
                "ms/token",
                taken[name],
                speedup=taken["full"].over(taken[name]),
                predicted=Samples(tuple(predicted[name][1:])).median if predicted[name] else None,
                notes=notes,
            )
        )
    return figures


def quantised(setup: Setup, bits: Sequence[int]) -> list[Figure]:
    """A token's latency at full depth and stage 0 with matrices of so many bits."""
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
    """What the weights, the decoding state and a whole run hold at most, in GB."""
    model, text = setup.model, setup.texts[0]
    weights = tree_reduce(lambda total, array: total + array.nbytes, model.parameters(), 0)
    mx.clear_cache()
    mx.reset_peak_memory()
    long = (list(text) * (count // len(text) + 1))[:count]
    state = DecodingState(model)
    policy = make_policy(model, Sampler())
    for _ in decode(model, long, policy, max_tokens=4, state=state):
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
    """Bytes of weights, keys and values read for one token at `stage` behind `context` tokens."""
    config, costs = model.config, bytes_read(model)
    weights = costs.lower(stage) + (costs.full_head() if full else costs.head(stage))
    seen = sum(min(context, w + 1) for w in config.windows[: config.stage_range(stage)[-1] + 1])
    size = model.resid_lambdas.dtype.size
    return int(weights) + 2 * seen * config.n_kv_head * config.head_dim * size


def _mode_cases(model: PoEModel, calibration: Calibration | None) -> dict[str, tuple[str, dict]]:
    cases: dict[str, tuple[str, dict]] = {
        "full": ("full", {}),
        "stage 0": ("stage", {"stage": 0}),
        "prefix of 2": ("prefix", {"max_stages": 2}),
        "compose all": ("compose", {}),
    }
    if calibration is None:
        return cases
    chosen = calibration.options
    draft = {"num_draft_tokens": 3, **chosen.get("speculative", {})}
    certify = {"p99_bounds": calibration.p99_bounds, **chosen.get("certified", {})}
    cases.update(
        {
            "wand": ("wand", {"p99_bounds": calibration.p99_bounds, **chosen.get("wand", {})}),
            "speculative, 3 drafts": ("speculative", {"draft_stage": 0, "num_draft_tokens": 3}),
            "speculative, as calibrated": ("speculative", draft),
            "speculative, half the draft head": (
                "speculative",
                {**draft, "draft_vocab": model.config.vocab_size // 2},
            ),
            "certified": ("certified", certify),
        }
    )
    several = model.config.per_stage_head or model.config.specialist_layers
    if not several and isinstance(model.lm_head, nn.Linear):
        quarter = {"draft_rank": model.config.n_embd // 4}
        cases["speculative, shortlist from a quarter of the head"] = (
            "speculative",
            {**draft, **quarter},
        )
        cases["certified, shortlist from a quarter of the head"] = (
            "certified",
            {**certify, **quarter},
        )
    return cases


def _recorded_cases(setup: Setup, recording: Recording) -> dict[str, tuple[str, dict]]:
    """Speculation and certified speculation with the options that pay best on the recording."""
    model = setup.model
    costs = measure(model, ROWS, text=setup.texts[0], trials=2)
    needed = exit_margins(model, recording.p99_bounds, safety=1.0)
    chosen = best_options(
        recording.traces, costs, needed, pools_stages=model.pools_stages, summed=False
    )
    label = "decided as recorded from poe-tiny"
    bounds = {"p99_bounds": recording.p99_bounds}
    return {
        f"speculative, {label}": ("speculative", chosen["speculative"][0]),
        f"certified, {label}": ("certified", {**chosen["certified"][0], **bounds}),
    }


def _decode(
    model: PoEModel, policy: Policy, state: DecodingState, text: Sequence[int], tokens: int
) -> tuple[float, list[DecodedToken]]:
    started = time.perf_counter()
    decoded = list(decode(model, text, policy, max_tokens=tokens, state=state))
    return time.perf_counter() - started, decoded


def _per_token(
    setup: Setup, mode: str, options: dict, state: DecodingState, text: Sequence[int]
) -> float:
    policy = make_policy(setup.model, Sampler(), mode, ModeOptions(**options))
    seconds, decoded = _decode(setup.model, policy, state, text, setup.tokens)
    return 1e3 * seconds / len(decoded)


def _first_token(model: PoEModel, mode: str, options: dict, text: Sequence[int]) -> float:
    policy = make_policy(model, Sampler(), mode, ModeOptions(**options))
    started = time.perf_counter()
    next(decode(model, text, policy, max_tokens=1))
    return time.perf_counter() - started


def _agreement(
    model: PoEModel, texts: Sequence[Sequence[int]], made: Sequence[Sequence[DecodedToken]]
) -> float:
    """How many of the tokens the full model would have chosen there too."""
    agreeing = total = 0
    for text, decoded in zip(texts, made, strict=True):
        tokens = [one.token for one in decoded]
        hidden = model.boundaries(mx.array([[*text, *tokens[:-1]]]))
        chosen = {k: h[len(text) - 1 :] for k, h in enumerate(hidden)}
        best = model.full_scores(chosen)[0].argmax(-1)
        agreeing += int(number((best == mx.array(tokens)).sum()))
        total += len(tokens)
    return agreeing / total


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
