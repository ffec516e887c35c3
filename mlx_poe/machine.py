"""What decoding steps cost on this machine: measured once for each model, then remembered."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from cognica_mlx import atomic
from cognica_mlx.costs import Costs, measure
from cognica_mlx.model import PoEModel

MEASURE_SECONDS = 2.0

# What stays the same from run to run; a GPU's free memory, for one, does not.
_DEVICE_KEYS = ("device_name", "architecture", "memory_size", "total_memory")


def known_costs(model: PoEModel) -> Costs:
    """The model's costs in seconds; measures them, for two seconds or so, the first time.

    They are kept in the user's cache folder (`XDG_CACHE_HOME`, by default ~/.cache), by shapes,
    types, device, MLX version and preloaded libraries.
    """
    # A cache that cannot be found, read or written only costs the two seconds again.
    cache = cache_folder()
    path = cache / f"costs-{_fingerprint(model)}.json" if cache else Path(os.devnull)
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        return _from_json(json.loads(path.read_text(encoding="utf-8")))
    costs = measure(model, seconds=MEASURE_SECONDS)
    if cache:
        with suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            atomic.write_text(path, json.dumps(asdict(costs)))
    return costs


def cache_folder() -> Path | None:
    """Where this user's measurements are kept; None for a user without a home."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(base) / "cognica-mlx"


def _from_json(fields: dict[str, Any]) -> Costs:
    return Costs(
        rows=tuple(map(int, fields["rows"])),
        stages=tuple(tuple(map(float, costs)) for costs in fields["stages"]),
        heads=tuple(tuple(map(float, costs)) for costs in fields["heads"]),
        full_boundaries=tuple(map(int, fields["full_boundaries"])),
    )


def _fingerprint(model: PoEModel) -> str:
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    device = mx.device_info()
    parts = [
        *(f"{name} {p.shape} {p.dtype}" for name, p in arrays.items()),
        *map(str, (model.config, [(stage.source, stage.rank) for stage in model.stages])),
        *map(str, (version("mlx"), mx.default_device())),
        *(f"{key} {device[key]}" for key in _DEVICE_KEYS if key in device),
        os.environ.get("LD_PRELOAD", ""),
        os.environ.get("OPENBLAS_NUM_THREADS", ""),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
