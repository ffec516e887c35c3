"""The measurements, section by section; each section returns a list of `Figure`.

- in: a model, texts, the machine
- out: figures with their spread, the limit set by memory bandwidth, and the prediction from a
  mode's measured parts
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import mlx.core as mx

from cognica_mlx.bench.machine_card import Machine
from cognica_mlx.bench.shapes import rounded
from cognica_mlx.bench.timing import Samples, interleaved
from cognica_mlx.decoding.modes import ModeOptions, make_mode
from cognica_mlx.decoding.requests import DecodedToken
from cognica_mlx.decoding.sequence import DecodingSequence, Mode
from cognica_mlx.decoding.single import Driver, decode, drive, prefill, set_depth
from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.costs import Costs, bytes_read, nbytes
from cognica_mlx.pricing.measuring import Progress
from cognica_mlx.pricing.timed_costs import measure

ROWS = (1, 2, 3, 4, 5, 6, 8, 16)
FULL = "full stack"


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
    notes: Mapping[str, float | str] = field(default_factory=dict)


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

    def interleaved(
        self,
        cases: Mapping[str, Callable[[], float]],
        label: str,
        before_round: Callable[[], None] = lambda: None,
    ) -> dict[str, Samples]:
        """See `timing.interleaved`; `label` is what the progress bar says."""
        return interleaved(cases, self.trials, self.progress, label, before_round)

    def state(self, depth: int, text: Sequence[int]) -> DecodingState:
        """A state that holds `text` without its last token, up to stage `depth`."""
        state = DecodingState(self.model)
        set_depth(state, depth)
        prefill(state, text[:-1], depth)
        return state


@dataclass(frozen=True)
class _Cut:
    """A cut-off to time: `stage`'s own predictions, or with None the full model's.

    `state` holds `text` without its last token. `baseline` names the cut-off to compare with.
    """

    model: PoEModel
    stage: int | None
    state: DecodingState
    text: Sequence[int]
    baseline: str = FULL
    notes: Mapping[str, float | str] = field(default_factory=dict)


def cut_mode(model: PoEModel, stage: int | None) -> Mode:
    """The mode that emits a stage's predictions; with None, the full model's."""
    if stage is None:
        return make_mode(model)
    return make_mode(model, "stage", ModeOptions(stage=stage))


def cut_name(stage: int | None) -> str:
    """The cut-off's name, with our number of the stage and the paper's."""
    return FULL if stage is None else f"stage {stage} (paper: Stage {stage + 1})"


def stages(setup: Setup) -> list[Figure]:
    """A token's latency at each stage cut-off and at full depth."""
    model, text, last = setup.model, setup.texts[0], setup.model.poe_n_stages - 1
    # A state of the text for each depth, kept for all trials.
    cuts = {
        cut_name(stage): _Cut(
            model, stage, setup.state(last if stage is None else stage, text), text
        )
        for stage in (*range(last), None)
    }
    return _latencies(setup, "stages", cuts)


def lengths(setup: Setup, counts: Sequence[int]) -> list[Figure]:
    """A token's latency at full depth and at stage 0, after texts of `counts` tokens."""
    model, longest = setup.model, setup.text(max(counts))
    state, cuts = DecodingState(model), {}
    for i, count in enumerate(sorted(counts)):
        prefill(state, longest[state.length : count - 1], model.poe_n_stages - 1)
        if setup.progress:
            setup.progress("reading", i + 1, len(counts))
        notes = {"state_mb": state.nbytes / 1e6}
        for stage in (None, 0):
            name = f"{cut_name(stage)} at {{}} tokens"
            cuts[name.format(count)] = _Cut(
                model, stage, state.fork(), longest[:count], name.format(min(counts)), notes
            )
    return _latencies(setup, "lengths", cuts)


def quantised(setup: Setup, bits: Sequence[int]) -> list[Figure]:
    """A token's latency at full depth and stage 0, with matrices of `bits` bits each."""
    text, last = setup.texts[0], setup.model.poe_n_stages - 1
    setups = {"as it is": setup}
    setups.update({f"{n} bits": replace(setup, model=rounded(setup.model, n)) for n in bits})
    cuts = {
        f"{cut_name(stage)}, {label}": _Cut(
            one.model, stage, one.state(depth, text), text, f"{FULL}, as it is"
        )
        for label, one in setups.items()
        for stage, depth in ((None, last), (0, 0))
    }
    return _latencies(setup, "quantised", cuts)


def _latencies(setup: Setup, section: str, cuts: Mapping[str, _Cut]) -> list[Figure]:
    """A token's latency at each cut-off, with its limit by the bytes that a token reads."""

    def per_token(cut: _Cut) -> float:
        model, mode = cut.model, cut_mode(cut.model, cut.stage)
        options: dict[str, Any] = {"max_tokens": setup.tokens, "state": cut.state}
        seconds, decoded = timed_decode(DecodingSequence(model, cut.text, mode, **options))
        return 1e3 * seconds / len(decoded)

    cases = {name: partial(per_token, cut) for name, cut in cuts.items()}
    taken, found = setup.interleaved(cases, section), []
    for name, cut in cuts.items():
        full = cut.stage is None
        stage = cut.model.poe_n_stages - 1 if cut.stage is None else cut.stage
        read = read_per_token(cut.model, stage, len(cut.text), full=full)
        more: dict[str, Any] = {
            "baseline": taken[cut.baseline],
            "limit": 1e3 * read / setup.machine.bandwidth,
            "notes": {"read_mb": read / 1e6, **cut.notes},
        }
        found.append(figure(section, name, "ms/token", taken[name], **more))
    return found


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
            notes = {"rows": float(count), "times_one_row": many.over(one)}
            label = f"{name}, {count} row{'s' * (count > 1)}"
            figures.append(figure("rows", label, "ms", many, notes=notes))
    return figures


def prompts(setup: Setup, count: int) -> list[Figure]:
    """Reading a prompt of `count` tokens: tokens per second, and the time to the first token."""
    text = setup.text(count)

    def first_token(stage: int | None) -> float:
        started = time.perf_counter()
        next(decode(setup.model, text, cut_mode(setup.model, stage), max_tokens=1))
        return time.perf_counter() - started

    cases = {cut_name(stage): partial(first_token, stage) for stage in (None, 0)}
    taken, found = setup.interleaved(cases, "prompts"), []
    for name, seconds in taken.items():
        speedup = taken[FULL].over(seconds)
        for label, unit, measured in (
            (f"{name}, {count} tokens", "tokens/s", seconds.each(lambda s: count / s)),
            (f"{name}, time to first token", "ms", seconds.each(lambda s: 1e3 * s)),
        ):
            found.append(figure("prompt", label, unit, measured, speedup=speedup))
    return found


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
        figure("memory", name, "GB", size / 1e9, notes={"of_weights": size / weights})
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


def figure(
    section: str,
    name: str,
    unit: str,
    measured: Samples | float,
    *,
    baseline: Samples | None = None,
    **more: Any,
) -> Figure:
    """A figure from its trials, with `more` of its fields; its speedup is over the `baseline`."""
    samples = measured if isinstance(measured, Samples) else Samples((measured,))
    if baseline:  # of rates, higher is better
        faster = unit == "tokens/s"
        more["speedup"] = samples.over(baseline) if faster else baseline.over(samples)
    return Figure(section, name, unit, samples.median, *samples.spread, **more)
