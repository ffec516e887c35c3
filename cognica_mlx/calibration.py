"""What was measured about a model's stages, and the small file beside the model that keeps it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cognica_mlx.config import PoEConfig
from cognica_mlx.errors import CheckpointError

CALIBRATION_FILE = "poe_calibration.json"

# Published for Cognica-PoE-v1.0-1.3B-base: 99th percentiles of what each step moves a logit.
PUBLISHED_BOUNDS = (7.09, 3.03, 2.15)
_PUBLISHED_SHAPE = (24, 1536, 32768, (6, 6, 6, 6), (), False)


@dataclass(frozen=True)
class Calibration:
    """Measurements on a text, and the options that follow from them.

    stage_layers: blocks of each stage, specialists' included, by which a file is known to fit.
    p99_bounds: for each step between stages, the 99th percentile of what it takes from the margin
    of the best token, in logits; the last step leads to the full model. margin_loss: the 50th, 90th
    and 99th percentiles. top1_agreement: of each stage with the full model, on the text.
    bits_per_byte: of each stage, then of the full model. acceptance: by draft stage, the share of
    drafts kept for 1, 2, ... drafts a round, on the model's own greedy continuations. options: for
    each mode, the options that its replay found best. speedups: what those promise against full
    depth if decoding costs the bytes it reads. recommended: the mode that promises most.
    text: what was measured on.
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

    @classmethod
    def load(cls, path: Path, config: PoEConfig) -> Calibration:
        """Read a file for a model of `config`; CheckpointError where it is damaged or another's."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            names = {f.name for f in fields(cls)}
            given = {k: _tuples(v) for k, v in content.items() if k in names}
            calibration = cls(**given)
            steps = len(calibration.p99_bounds)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is no calibration ({error}); delete it, or make it anew with "
                "mlx_poe.calibrate"
            ) from None
        if calibration.stage_layers != config.stage_layers + config.specialist_layers or (
            steps != config.poe_n_stages - 1
        ):
            raise CheckpointError(
                f"{path} was made for stages of {list(calibration.stage_layers)} layers, which "
                "this model does not have; delete it, or make it anew with mlx_poe.calibrate"
            )
        return calibration

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(asdict(self), file, indent=1)
                file.write("\n")
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def published_bounds(config: PoEConfig) -> Sequence[float] | None:
    """The published WAND bounds, for the one model that they were measured on."""
    shape = (
        config.n_layer,
        config.n_embd,
        config.vocab_size,
        config.stage_layers,
        config.specialist_layers,
        config.per_stage_head,
    )
    return PUBLISHED_BOUNDS if shape == _PUBLISHED_SHAPE else None


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
