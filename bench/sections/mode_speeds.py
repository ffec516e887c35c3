"""Every decoding mode on the same texts, compared with the full stack and with its own parts.

- in: a setup, a calibration for the modes' options, or a recording that decides the drafts
- out: a figure for each mode: its speed, its agreement with the full model, the speed predicted
  from its parts
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from cognica_mlx.bench.sections.stage_speeds import ROWS, Figure, Setup, figure, timed_decode
from cognica_mlx.calibration_file import Calibration
from cognica_mlx.decoding.modes import ModeOptions, make_mode
from cognica_mlx.decoding.requests import DecodedToken
from cognica_mlx.decoding.scripted import RIGHT, Script, Scripted
from cognica_mlx.decoding.sequence import DecodingSequence, Mode
from cognica_mlx.decoding.single import Driver, Single
from cognica_mlx.decoding.speculative import Speculative
from cognica_mlx.decoding.wand import exit_margins
from cognica_mlx.errors import RequestError
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.costs import Costs
from cognica_mlx.pricing.pace import Metered, Pace
from cognica_mlx.pricing.replaying import COPY_BITS, Trace, best_options
from cognica_mlx.pricing.timed_costs import measure, measure_drafter


@dataclass(frozen=True)
class Recording:
    """A small trained model's drafts: `traces` along its own texts, and its p99 bounds."""

    traces: Sequence[Trace]
    p99_bounds: Sequence[float]


def modes(
    setup: Setup,
    calibration: Calibration | None,
    recording: Recording | None = None,
    remark: Callable[[str], None] = lambda _: None,
) -> list[Figure]:
    """Every decoding mode on the same texts: speed, agreement with the full model, and the speed
    predicted from parts measured in the same trials. With a `recording`, it decides which drafts
    are accepted, and agreement is the recording's. `remark` is called with what the model cannot
    do, which is left out."""
    model = setup.model
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "full": ("full", {}),
        "stage 0": ("stage", {"stage": 0}),
        "prefix of 2": ("prefix", {"max_stages": 2}),
        "compose all": ("compose", {}),
    }
    drafting = _recorded_cases(setup, recording) if recording else _drafting_cases(calibration)
    cases |= {name: ("speculative", options) for name, options in drafting.items()}
    if calibration and not recording:
        bounds = {"p99_bounds": calibration.p99_bounds}
        cases["wand"] = ("wand", {**bounds, **calibration.options.get("wand", {})})
    chosen: dict[str, Mode] = {}
    for name, (mode, options) in list(cases.items()):
        try:
            chosen[name] = make_mode(model, mode, ModeOptions(**options), calibration)
        except RequestError as error:
            del cases[name]
            remark(f"{name} is left out: {error}")
    last = model.poe_n_stages - 1
    held = {name: [setup.state(last, text) for text in setup.texts] for name in cases}
    made: dict[str, list[list[DecodedToken]]] = {}
    drafted: dict[str, int] = {}
    predicted: defaultdict[str, list[float]] = defaultdict(list)
    overhead: defaultdict[str, list[float]] = defaultdict(list)
    costs: list[Costs] = []
    spare = setup.state(last, setup.texts[0])

    prefixes = [one.prefix for one in chosen.values() if isinstance(one, Speculative)]
    copies = list({id(prefix): prefix for prefix in prefixes if prefix}.values())
    rounded: dict[int, Costs] = {}

    def measure_parts() -> None:
        costs.append(measure(model, ROWS, state=spare, trials=1))
        for prefix in copies:
            rounded[id(prefix)] = measure_drafter(prefix, ROWS, state=spare, trials=1)

    def run(name: str) -> float:
        mode = chosen[name]
        prefix = mode.prefix if isinstance(mode, Speculative) else None
        own = replace(costs[-1], rounded=rounded[id(prefix)]) if prefix else costs[-1]
        pace = Pace(own, mode, falls_back=False)
        seconds, made[name], drafted[name] = 0.0, [], 0
        for i, (text, state) in enumerate(zip(setup.texts, held[name], strict=True)):
            driver: Driver = Single()
            if recording and isinstance(mode, Speculative):
                trace = recording.traces[i % len(recording.traces)]
                hits = trace.draft_hits
                if mode.prefix and trace.copy_hits is not None:
                    hits = np.stack([trace.copy_hits, *hits[1:]])
                driver = Scripted(driver, Script(hits, len(text)))
            sequence = DecodingSequence(
                model, text, mode, max_tokens=setup.tokens, state=state, advice=pace
            )
            taken, decoded = timed_decode(sequence, Metered(driver, pace))
            seconds += taken
            made[name].append(decoded)
            drafted[name] += sequence.drafted
        total = sum(map(len, made[name]))
        predicted[name].append(pace.costs.full_token * total / pace.spent)
        overhead[name].append(seconds / pace.spent - 1)
        return 1e3 * seconds / total

    runs = {name: partial(run, name) for name in cases}
    taken = setup.interleaved(runs, "decoding modes", measure_parts)
    figures = []
    for name in cases:
        tokens = [one for text in made[name] for one in text]
        if recording and drafted[name]:
            agreement = sum(one.token == RIGHT for one in tokens) / len(tokens)
        else:
            agreement = _agreement(model, setup.texts, made[name])
        notes: dict[str, float | str] = {
            "agreement": agreement,
            "mean_depth": sum(one.stage + 1 for one in tokens) / len(tokens),
            "options": ", ".join(f"{k} {v}" for k, v in cases[name][1].items()),
        }
        if drafted[name]:
            notes["acceptance"] = sum(one.from_draft for one in tokens) / drafted[name]
        notes["over_its_parts"] = float(np.median(overhead[name][1:]))
        more: dict[str, Any] = {"predicted": float(np.median(predicted[name][1:])), "notes": notes}
        figures.append(
            figure("modes", name, "ms/token", taken[name], baseline=taken["full"], **more)
        )
    return figures


def _drafting_cases(calibration: Calibration | None) -> dict[str, dict[str, Any]]:
    """Options of speculation, by a case's name."""
    plain = {"draft_stage": 0, "num_draft_tokens": 3}
    calibrated = calibration and dict(calibration.options.get("speculative", plain))
    return {
        "speculative, 3 drafts": plain,
        **({"speculative, as calibrated": calibrated} if calibrated else {}),
        f"speculative, 3 drafts of a {COPY_BITS}-bit copy": {**plain, "draft_bits": COPY_BITS},
        "speculative, looked up only": {"draft_lookup": True, "num_draft_tokens": 0},
    }


def _recorded_cases(setup: Setup, recording: Recording) -> dict[str, dict[str, Any]]:
    """The same with the options that pay best on the recording."""
    model = setup.model
    costs = measure(model, ROWS, text=setup.texts[0], trials=2)
    needed = exit_margins(model, recording.p99_bounds, safety=1.0)
    chosen = best_options(model, recording.traces, costs, needed)
    label = "decided as recorded from poe-tiny"
    copy = {"draft_bits": COPY_BITS, "draft_stage": 0, "num_draft_tokens": 4}
    return {
        f"speculative, {label}": chosen["speculative"][0],
        f"speculative, 4 drafts of a 4-bit copy, {label}": copy,
    }


def _agreement(
    model: PoEModel, texts: Sequence[Sequence[int]], made: Sequence[Sequence[DecodedToken]]
) -> float:
    """The share of tokens that the full model would have chosen too."""
    agreeing = total = 0
    for text, decoded in zip(texts, made, strict=True):
        tokens = [one.token for one in decoded]
        hidden = model.boundaries(mx.array([[*text, *tokens[:-1]]]))
        chosen = {k: h[len(text) - 1 :] for k, h in enumerate(hidden)}
        best = model.full_scores(chosen)[0].argmax(-1)
        agreeing += int((best == mx.array(tokens)).sum())
        total += len(tokens)
    return agreeing / total
