"""The decoding modes by name, and the options that each takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from cognica_mlx.calibration_file import Calibration, published_bounds
from cognica_mlx.decoding.drafters import StageDrafter
from cognica_mlx.decoding.plain import Plain
from cognica_mlx.decoding.quantized_prefix import quantize_prefix
from cognica_mlx.decoding.sequence import Mode
from cognica_mlx.decoding.speculative import Speculative
from cognica_mlx.decoding.targets import (
    composed_target,
    draft_target,
    full_target,
    prefix_target,
    stage_target,
)
from cognica_mlx.decoding.wand import Wand
from cognica_mlx.errors import RequestError, deleted
from cognica_mlx.network.model import PoEModel
from cognica_mlx.scheme import draft_scheme

# The most drafts in a round by default: more from a quantized copy, which is cheaper.
DRAFTS, COPY_DRAFTS = 3, 6

# Each mode with the options that it takes.
MODES: dict[str, tuple[str, ...]] = {
    "full": (),
    "stage": ("stage",),
    "prefix": ("max_stages",),
    "compose": ("stages", "stage_weights"),
    "wand": ("safety", "p99_bounds", "exit_stages"),
    "speculative": (
        *("draft_stage", "num_draft_tokens", "draft_head", "draft_bits", "draft_lookup"),
    ),
}

# Options that may be given while the calibration decides the rest.
_BESIDE_CALIBRATED = {"safety", "draft_head", "draft_lookup"}

# Modes that may cost more than they save, so a `Pace` watches them.
PACED_MODES = ("wand", "speculative")


@dataclass(frozen=True)
class ModeOptions:
    """Options of the modes; None means the mode's default (in parentheses) or the calibration's.

    stage: the boundary that `stage` predicts from (0). max_stages: how many stages `prefix` runs
    (all). stages, stage_weights: what `compose` mixes (all, equally). safety: factor on the bounds
    (1.0). p99_bounds: one for each step between stages. exit_stages: where `wand` may exit (all).
    draft_stage (0), num_draft_tokens (3; 6 with a quantized copy), draft_head (summed): how drafts
    are made. draft_bits (off): the bits, or "mxfp4" or "nvfp4", of a quantized copy of the stages
    and heads that draft. draft_lookup (off): also draft what followed the same tokens earlier in
    the text; num_draft_tokens may then be 0.
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
    draft_head: str | None = None
    draft_bits: int | str | None = None
    draft_lookup: bool | None = None


def check_mode(mode: object) -> None:
    """Raise RequestError unless there is a mode of this name."""
    if not isinstance(mode, str) or mode not in MODES:
        raise RequestError(deleted(mode) or f"mode {mode!r} is not one of {', '.join(MODES)}")


def make_mode(
    model: PoEModel,
    mode: str = "full",
    options: ModeOptions | None = None,
    calibration: Calibration | None = None,
) -> Mode:
    """The mode of that name.

    Raises RequestError for an unknown mode, an option that the mode does not take, a stage that
    the model does not have, or missing bounds.
    """
    options = options or ModeOptions()
    check_mode(mode)
    given = {f.name: getattr(options, f.name) for f in fields(options)}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in MODES[mode]:
            takers = " or ".join(m for m, names in MODES.items() if name in names)
            raise RequestError(f"{name} belongs to mode {takers}, not to {mode}")
    if mode == "full":
        return Plain(full_target(model))
    if mode == "stage":
        return Plain(stage_target(model, given.get("stage", 0)))
    if mode == "prefix":
        return Plain(prefix_target(model, given.get("max_stages", model.poe_n_stages)))
    if mode == "compose":
        stages = given.get("stages", range(model.poe_n_stages))
        return Plain(composed_target(model, stages, given.get("stage_weights")))
    if calibration and given.keys() <= _BESIDE_CALIBRATED:
        given = {**_advised(model, calibration.options.get(mode, {}), given), **given}
    if "p99_bounds" in MODES[mode] and "p99_bounds" not in given:
        given["p99_bounds"] = _bounds(model, calibration)
    return Wand(model, **given) if mode == "wand" else _speculative(model, **given)


def _advised(
    model: PoEModel, options: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """A calibration's options for a mode, without a quantized copy if the model (which may
    be quantized itself) or the options given do not allow one."""
    advised = dict(options)
    if bits := advised.get("draft_bits"):
        head = given.get("draft_head", "summed")
        try:
            quantize_prefix(model, draft_scheme(bits), advised.get("draft_stage", 0), head)
        except RequestError:
            del advised["draft_bits"]
    return advised


def last_resort(model: PoEModel) -> Mode | None:
    """The mode to continue with when machines that hold deeper stages are lost: the deepest stage
    before those; None if that is not wanted."""
    lost = next((stage for stage in model.stages if stage.rank), None)
    if lost is None or not lost.dispensable:
        return None
    return Plain(stage_target(model, model.stages.index(lost) - 1))


def _speculative(
    model: PoEModel,
    draft_stage: int = 0,
    num_draft_tokens: int | None = None,
    draft_head: str = "summed",
    draft_bits: int | str | None = None,
    draft_lookup: bool = False,
) -> Speculative:
    model.check_stage(draft_stage, "draft_stage")
    drafters = [StageDrafter(draft_target(model, draft_stage, draft_head))]
    if draft_bits is not None:
        prefix = quantize_prefix(model, draft_scheme(draft_bits), draft_stage, draft_head)
        drafters.insert(0, StageDrafter(prefix.target, prefix))
    if num_draft_tokens is None:
        num_draft_tokens = DRAFTS if draft_bits is None else COPY_DRAFTS
    return Speculative(full_target(model), drafters, num_draft_tokens, draft_lookup)


def _bounds(model: PoEModel, calibration: Calibration | None) -> Sequence[float]:
    if not calibration and model.calibration_problem:
        raise RequestError(model.calibration_problem)
    bounds = calibration.p99_bounds if calibration else published_bounds(model.config)
    if bounds is None:
        raise RequestError(
            "this model has no calibration, which wand needs; make one with mlx_poe.calibrate, "
            "or give p99_bounds"
        )
    return bounds
