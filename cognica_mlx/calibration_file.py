"""Measurements of a model's stages, and the small file beside the model that stores them.

A calibration is optional: a model loads without one, and an unusable file is reported only when it
is needed. Everything in a file is checked before any of it is used.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from cognica_mlx.config import MAX_NUMBER, PoEConfig
from cognica_mlx.errors import DELETED, CheckpointError, PoEWarning, RequestError
from cognica_mlx.files import lineage, strict_json, whole_file
from cognica_mlx.files.git_lfs import pointer_problem
from cognica_mlx.scheme import draft_scheme

CALIBRATION_FILE = "poe_calibration.json"

# Published for Cognica-PoE-v1.0-1.3B-base: 99th percentiles of how far each step moves a logit.
PUBLISHED_BOUNDS = (7.09, 3.03, 2.15)
_PUBLISHED_SHAPE = {
    **{"n_layer": 24, "n_embd": 1536, "vocab_size": 32768, "stage_layers": (6, 6, 6, 6)},
    **{"specialist_layers": (), "per_stage_head": False},
}


class CalibrationWarning(PoEWarning):
    """A model's calibration file cannot be used, or only in part; modes run with their defaults."""


@dataclass(frozen=True)
class Calibration:
    """Measurements on a text, and the options that follow from them.

    stage_layers: blocks of each stage, including specialists; a file fits only a model with the
    same stages. p99_bounds: for each step between stages, the 99th percentile of what it takes from
    the best token's margin, in logits; the last step leads to the full model. margin_loss: the
    50th, 90th and 99th percentiles. top1_agreement: of each stage with the full model, on the text.
    bits_per_byte: of each stage, then of the full model. acceptance: by draft stage, the share of
    drafts accepted with 1, 2, ... drafts per round, on the model's own greedy continuations.
    options: for each mode, the options that its replay found best. speedups: the expected gain over
    full depth if decoding costs the bytes it reads. recommended: the mode with the largest gain.
    text: the amount of text measured. weights: the sketch of the model that was measured; {} in
    older files.
    """

    stage_layers: tuple[int, ...]
    p99_bounds: tuple[float, ...]
    margin_loss: tuple[tuple[float, float, float], ...]
    top1_agreement: tuple[float, ...]
    bits_per_byte: tuple[float, ...]
    acceptance: Mapping[str, Sequence[float]]
    options: Mapping[str, Mapping[str, Any]]
    speedups: Mapping[str, float]
    recommended: str
    text: Mapping[str, Any]
    weights: Mapping[str, str]

    @classmethod
    def load(cls, path: Path, config: PoEConfig) -> Calibration:
        """Read a file for a model of `config`.

        Raises CheckpointError if the file is damaged, contains anything that the modes cannot use,
        or belongs to another model.
        """
        try:
            content = strict_json.read(path)
            if old := _drop_deleted(content):
                warnings.warn(
                    f"{path} names {' and '.join(old)}, which no longer exist: ignored; "
                    "mlx_poe.calibrate makes a new one",
                    CalibrationWarning,
                    stacklevel=2,
                )
            _check(content, config)
        except (OSError, ValueError, RecursionError) as error:
            if problem := pointer_problem(path):
                raise CheckpointError(f"{path} {problem}") from None
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise CheckpointError(_unusable(path, reason)) from None
        return cls(**{field.name: _tuples(content[field.name]) for field in fields(cls)})

    def to_json(self) -> str:
        """The file's content. Raises RequestError if a measurement is not finite."""
        try:
            return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"
        except ValueError:
            raise RequestError(
                "a measurement is not finite: are the model's weights damaged?"
            ) from None

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        whole_file.write_text(path, self.to_json())


def read_calibration(
    folder: Path, config: PoEConfig, sketch: Callable[[], lineage.Sketch]
) -> tuple[Calibration | None, str | None]:
    """The calibration in a model's folder, if there is one, or else why it cannot be used.

    `sketch` makes the model's sketch, if the file has one to compare.
    """
    path = folder / CALIBRATION_FILE
    if not path.is_file():
        return None, None
    try:
        found = Calibration.load(path, config)
    except CheckpointError as error:
        return None, str(error)
    measured = lineage.recorded({"weights": found.weights}, "weights")
    if measured and (odd := lineage.difference(measured, sketch())):
        return None, _unusable(path, f"made for another model: its {odd} differs")
    return found, None


def published_bounds(config: PoEConfig) -> Sequence[float] | None:
    """The published WAND bounds, for the one model that they were measured on; else None."""
    fits = all(getattr(config, name) == value for name, value in _PUBLISHED_SHAPE.items())
    return PUBLISHED_BOUNDS if fits else None


def _unusable(path: Path, reason: object) -> str:
    return (
        f"{path} is not a usable calibration ({reason}): delete it, or make a new one with "
        "mlx_poe.calibrate"
    )


def _drop_deleted(content: Any) -> list[str]:
    """Take what older versions wrote of deleted modes and options out of a file's content. Returns
    their names."""
    if not isinstance(content, dict):
        return []
    options, speedups = content.get("options"), content.get("speedups")
    tables = [options, speedups, *(options.values() if isinstance(options, dict) else ())]
    found = {
        name
        for table in tables
        if isinstance(table, dict)
        for name in DELETED
        if table.pop(name, table) is not table
    }
    if content.get("recommended") == "certified":
        content["recommended"] = "speculative"
    return sorted(found)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


# Checks of a file's content. Each takes a value and its name, and raises ValueError.

_Check = Callable[[Any, str], object]


def _check(content: Any, config: PoEConfig) -> None:
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    steps, layers = config.poe_n_stages - 1, list(config.stage_layers + config.specialist_layers)
    shares = partial(_list, each=partial(_number, most=1))
    stage = partial(_number, most=steps, whole=True)
    # The options that a calibration may set for each mode; their ranges are the modes' own.
    modes: dict[str, dict[str, _Check]] = {
        "wand": {"safety": _number, "exit_stages": partial(_list, each=stage)},
        "speculative": {
            "num_draft_tokens": partial(_number, least=1, most=64, whole=True),
            "draft_stage": stage,
            "draft_bits": lambda value, _: draft_scheme(value),
            "draft_lookup": partial(_one_of, known=[False, True]),
            "draft_head": partial(_one_of, known=["summed", "base"]),
        },
    }
    checks: dict[str, _Check] = {
        "stage_layers": partial(_list, each=partial(_number, least=1, whole=True)),
        "p99_bounds": partial(_list, each=_number, length=steps),
        "margin_loss": partial(_list, each=partial(_list, each=_number, length=3), length=steps),
        "top1_agreement": partial(shares, length=steps),
        "bits_per_byte": partial(_list, each=_number, length=steps + 2),
        "acceptance": partial(_table, keys=[*map(str, range(steps))], each=shares),
        "options": partial(_table, keys=modes, each=_table),
        "speedups": partial(_table, keys=modes, each=_number),
        "recommended": partial(_one_of, known=["full", *modes]),
        "text": _table,
        "weights": _sketch,
    }
    content.setdefault("weights", {})  # older files lack it
    for name, check in checks.items():
        if name not in content:
            raise ValueError(f"{name} is missing")
        check(content[name], name)
        if name == "stage_layers" and content[name] != layers:
            raise ValueError(
                f"made for stages of {content[name]} layers, but this model has {layers}"
            )
    for mode, options in content["options"].items():
        name = f"options of {mode}"
        _table(options, name, keys=modes[mode])
        for option, value in options.items():
            modes[mode][option](value, f"{option} in the {name}")


def _number(
    value: Any, name: str, least: float = 0, most: float = MAX_NUMBER, whole: bool = False
) -> None:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise ValueError(f"{name}: {_brief(value)} is not a {'whole ' if whole else ''}number")
    if not least <= value <= most:
        raise ValueError(f"{name}: {_brief(value)} is not between {least} and {most}")


def _sketch(value: Any, name: str) -> None:
    try:
        lineage.recorded({name: value}, name)
    except CheckpointError:
        raise ValueError(f"{name} is damaged") from None


def _list(value: Any, name: str, each: _Check, length: int | None = None) -> None:
    if not isinstance(value, list):
        raise ValueError(f"{name}: {_brief(value)} is not a list")
    if length is not None and len(value) != length:
        raise ValueError(f"{name} has {len(value)} entries, not {length}")
    for item in value:
        each(item, name)


def _table(
    value: Any, name: str, keys: Sequence[str] | Mapping[str, Any] = (), each: _Check | None = None
) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{name}: {_brief(value)} is not an object")
    for key, item in value.items():
        if keys and key not in keys:
            raise ValueError(f"{name}: {_brief(key)} is not one of {', '.join(keys)}")
        if each:
            each(item, name)


def _one_of(value: Any, name: str, known: Sequence[Any]) -> None:
    if type(value) is not type(known[0]) or value not in known:
        raise ValueError(f"{name}: {_brief(value)} is not one of {', '.join(map(str, known))}")


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 40 else f"{text[:37]}..."
