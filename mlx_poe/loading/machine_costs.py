"""What decoding steps cost on this machine: measured once per model, then cached."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from cognica_mlx.backend import blas
from cognica_mlx.decoding.modes import last_resort
from cognica_mlx.decoding.sequence import Mode
from cognica_mlx.decoding.speculative import Speculative
from cognica_mlx.errors import RankLostError
from cognica_mlx.files import strict_json, whole_file
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.costs import Costs, bytes_read
from cognica_mlx.pricing.timed_costs import measure, measure_drafter

MEASURE_SECONDS = 2.0
MAX_SECONDS = 1e6  # for one part of a pass; a file with more was not written here

# These stay the same from run to run, unlike a GPU's free memory.
_DEVICE_KEYS = ("device_name", "architecture", "memory_size", "total_memory")


def known_costs(model: PoEModel, mode: Mode | None = None) -> Costs:
    """The model's costs in seconds, including those of the quantized drafter of `mode`. The first
    call measures them, for about two seconds.

    They are cached in the user's cache folder (`XDG_CACHE_HOME`, by default ~/.cache), by shapes,
    types, device, MLX version and BLAS.
    """
    count = model.poe_n_stages
    try:
        costs = _remembered(
            _fingerprint(model), lambda: measure(model, seconds=MEASURE_SECONDS), count, count
        )
    except RankLostError:
        if last_resort(model) is None:
            raise
        # Nothing can be measured, and nothing needs to be: every reply goes on with the stages that
        # are left.
        return bytes_read(model)
    prefix = mode.prefix if isinstance(mode, Speculative) else None
    if prefix is None:
        return costs
    made = f"{prefix.of} {prefix.target.scheme} {prefix.target.key[0]}"
    fingerprint = _fingerprint(model, made, *(f"{a.shape} {a.dtype}" for a in prefix.arrays))
    stages = len(prefix.stages)
    rounded = _remembered(fingerprint, lambda: measure_drafter(prefix), stages, 1)
    return replace(costs, rounded=rounded)


def _remembered(fingerprint: str, measured: Callable[[], Costs], stages: int, heads: int) -> Costs:
    # If the cache cannot be found, read or written, measuring again costs only two seconds.
    cache = cache_folder()
    path = cache / f"costs-{fingerprint}.json" if cache else Path(os.devnull)
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        return _from_json(strict_json.read(path), stages, heads)
    costs = measured()
    if cache:
        with suppress(OSError):
            whole_file.private_folder(cache)
            whole_file.write_text(path, json.dumps(asdict(costs)))
    return costs


def cache_folder() -> Path | None:
    """This user's cache folder; None for a user without a home folder."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(base) / "cognica-mlx"


def _from_json(fields: Any, stages: int, heads: int) -> Costs:
    """The costs in a file for so many stages and heads. ValueError if they cannot be used."""
    costs = Costs(
        rows=tuple(fields["rows"]),
        stages=tuple(map(tuple, fields["stages"])),
        heads=tuple(map(tuple, fields["heads"])),
        full_boundaries=tuple(fields["full_boundaries"]),
    )
    each = (*costs.stages, *costs.heads)
    usable = (
        all(type(count) is int for count in (*costs.rows, *costs.full_boundaries))
        and sorted({0, *costs.rows}) == [0, *costs.rows] != [0]
        and (len(costs.stages), len(costs.heads)) == (stages, heads)
        and set() < set(costs.full_boundaries) <= set(range(heads))
        and all(len(part) == len(costs.rows) for part in each)
        and all(type(c) in (int, float) and 0 < c < MAX_SECONDS for part in each for c in part)
    )
    if not usable:
        raise ValueError("not the costs of such a model")
    return costs


def _fingerprint(model: PoEModel, *more: str) -> str:
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    device = mx.device_info()
    parts = [
        *(f"{name} {p.shape} {p.dtype}" for name, p in arrays.items()),
        *map(str, (model.config, [(stage.source, stage.rank) for stage in model.stages])),
        *map(str, (version("mlx"), mx.default_device())),
        *(f"{key} {device[key]}" for key in _DEVICE_KEYS if key in device),
        blas.in_use(),
        *more,
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
