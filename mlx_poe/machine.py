"""What decoding steps cost on this machine: measured once for each model, then remembered."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from cognica_mlx.costs import Costs, measure
from cognica_mlx.model import PoEModel

MEASURE_SECONDS = 2.0


def known_costs(model: PoEModel) -> Costs:
    """The model's costs in seconds; measures them, for two seconds or so, the first time.

    They are kept in the user's cache folder (`XDG_CACHE_HOME`, by default ~/.cache), by shapes,
    types, device, MLX version and preloaded libraries.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cognica-mlx"
    path = cache / f"costs-{_fingerprint(model)}.json"
    # A cache that cannot be read or written only costs the two seconds again.
    with suppress(OSError, ValueError, TypeError, KeyError):
        return _from_json(json.loads(path.read_text()))
    costs = measure(model, seconds=MEASURE_SECONDS)
    with suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache, delete=False) as file:
            file.write(json.dumps(asdict(costs)))
        Path(file.name).replace(path)
    return costs


def _from_json(fields: dict[str, list]) -> Costs:
    return Costs(
        rows=tuple(map(int, fields["rows"])),
        stages=tuple(tuple(map(float, costs)) for costs in fields["stages"]),
        heads=tuple(tuple(map(float, costs)) for costs in fields["heads"]),
        full_boundaries=tuple(map(int, fields["full_boundaries"])),
    )


def _fingerprint(model: PoEModel) -> str:
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    parts = [
        *(f"{name} {p.shape} {p.dtype}" for name, p in arrays.items()),
        *map(str, (model.config, [stage.source for stage in model.stages])),
        *map(str, (version("mlx"), mx.default_device())),
        str(mx.device_info()),
        os.environ.get("LD_PRELOAD", ""),
        os.environ.get("OPENBLAS_NUM_THREADS", ""),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
