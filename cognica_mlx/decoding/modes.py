"""The decoding modes by name, and the options that each takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from cognica_mlx.calibration import Calibration, published_bounds
from cognica_mlx.decoding.certified import Certified
from cognica_mlx.decoding.loop import Policy
from cognica_mlx.decoding.pace import Pace
from cognica_mlx.decoding.plain import Plain
from cognica_mlx.decoding.speculative import Speculative
from cognica_mlx.decoding.targets import (
    composed_target,
    full_target,
    prefix_target,
    stage_target,
)
from cognica_mlx.decoding.wand import Wand
from cognica_mlx.errors import RequestError
from cognica_mlx.model import PoEModel
from cognica_mlx.sampling import Sampler

# Each mode with the options that mean something to it.
MODES: dict[str, tuple[str, ...]] = {
    "full": (),
    "stage": ("stage",),
    "prefix": ("max_stages",),
    "compose": ("stages", "stage_weights"),
    "wand": ("safety", "p99_bounds", "exit_stages"),
    "speculative": (
        *("draft_stage", "num_draft_tokens", "draft_margin"),
        *("draft_head", "draft_vocab", "draft_rank"),
    ),
    "certified": (
        *("safety", "p99_bounds", "draft_stage", "num_draft_tokens"),
        *("draft_margin", "draft_rank"),
    ),
}

# Those that may cost more than they save, which a `Pace` watches over.
PACED_MODES = ("wand", "speculative", "certified")


@dataclass(frozen=True)
class ModeOptions:
    """What a mode may be told; None leaves a value to the mode's default or the calibration.

    stage: the boundary that `stage` predicts from (0). max_stages: how many stages `prefix` runs
    (all). stages, stage_weights: what `compose` mixes (all, equally). safety: factor on the bounds
    (1.0). p99_bounds: one for each step between stages. exit_stages: where `wand` may leave (all).
    draft_stage (0), num_draft_tokens (3), draft_margin (off), draft_head (summed), draft_vocab
    (all), draft_rank (all): how drafts are made.
    """

    stage: int | None = None
    max_stages: int | None = None
    stages: Sequence[int] | None = None
    stage_weights: Sequence[float] | None = None
    safety: float | None = None
    p99_bounds: Sequence[float] | None = None
    exit_stages: Sequence[int] | None = None
    draft_stage: int | None = None
    num_draft_tokens: int | None = None
    draft_margin: float | None = None
    draft_head: str | None = None
    draft_vocab: int | None = None
    draft_rank: int | None = None


def make_policy(
    model: PoEModel,
    sampler: Sampler,
    mode: str = "full",
    options: ModeOptions | None = None,
    calibration: Calibration | None = None,
    pace: Pace | None = None,
) -> Policy:
    """The policy of `mode`; `pace` watches over one that may not pay.

    Raises RequestError for an unknown mode, an option that the mode does not take, a stage that
    the model does not have, or bounds that are needed and nowhere to be found.
    """
    options = options or ModeOptions()
    if mode not in MODES:
        raise RequestError(f"mode {mode!r} is none of {', '.join(MODES)}")
    given = {f.name: getattr(options, f.name) for f in fields(options)}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in MODES[mode]:
            takers = " or ".join(m for m, names in MODES.items() if name in names)
            raise RequestError(f"{name} belongs to mode {takers}, not to {mode}")
    if mode == "full":
        return Plain(full_target(model), sampler)
    if mode == "stage":
        return Plain(stage_target(model, given.get("stage", 0)), sampler)
    if mode == "prefix":
        return Plain(prefix_target(model, given.get("max_stages", model.poe_n_stages)), sampler)
    if mode == "compose":
        stages = given.get("stages", range(model.poe_n_stages))
        return Plain(composed_target(model, stages, given.get("stage_weights")), sampler)
    if calibration and given.keys() <= {"safety", "draft_head", "draft_vocab", "draft_rank"}:
        given = {**calibration.options.get(mode, {}), **given}
    if "p99_bounds" in MODES[mode] and "p99_bounds" not in given:
        given["p99_bounds"] = _bounds(model, calibration)
    if mode == "wand":
        return Wand(model, sampler, **given, pace=pace)
    if mode == "certified":
        return Certified(model, sampler, **given, pace=pace)
    return Speculative(model, sampler, **given, pace=pace)


def _bounds(model: PoEModel, calibration: Calibration | None) -> Sequence[float]:
    problem = getattr(model, "calibration_problem", None)
    if not calibration and problem:
        raise RequestError(problem)
    bounds = calibration.p99_bounds if calibration else published_bounds(model.config)
    if bounds is None:
        raise RequestError(
            "this model has no calibration, which wand and certified need; "
            "make one with mlx_poe.calibrate, or give p99_bounds"
        )
    return bounds
