"""A training checkpoint in one safetensors file, written whole or not at all.

- in: a `Training` and its settings, JSON-ready
- out: the same, checked against a fresh state before use
- it holds the weights, the optimizer state, accumulated gradients, the best weights so far and the
  loss curve. The order of the data and the learning rate follow from the iteration, so no random
  state is saved
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from cognica_mlx.errors import CheckpointError, one_line
from cognica_mlx.files import whole_file
from cognica_mlx.files.safetensors_files import write_arrays
from cognica_mlx.training.trainer import Evaluation, Training

VERSION = 1
_ARRAYS = ("parameters", "optimizer", "gradients", "best")
_NUMBERS = ("iteration", "counted", "best_iteration", "loss", "loss_tokens")


def save_training(path: Path, state: Training, settings: dict[str, Any]) -> None:
    """Write the file. Raises CheckpointError, keeping the old file, if it cannot be written."""
    arrays = {
        f"{kind}/{name}": array for kind in _ARRAYS for name, array in getattr(state, kind).items()
    }
    fields = {name: getattr(state, name) for name in _NUMBERS}
    curve = [asdict(evaluation) for evaluation in state.curve]
    content = {"version": VERSION, "settings": settings, "curve": curve, **fields}
    try:
        with whole_file.replacing(path, ".safetensors") as temporary:
            write_arrays(temporary, arrays, {"training": json.dumps(content)})
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from None


def read_training(path: Path) -> tuple[Training, dict[str, Any]]:
    """The state and the settings in a file that `save_training` wrote.

    Raises CheckpointError if the file is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: there is nothing to resume from")
    try:
        with safe_open(path, framework="np") as file:
            content = json.loads((file.metadata() or {})["training"])
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']} is not {VERSION}")
        arrays = mx.load(str(path))
        assert isinstance(arrays, dict)
        parts: dict[str, Any] = {kind: {} for kind in _ARRAYS}
        for key, array in arrays.items():
            kind, _, name = key.partition("/")
            parts[kind][name] = array
        mx.eval(parts)
        state = Training(
            **parts,
            **{name: content[name] for name in _NUMBERS},
            curve=tuple(Evaluation(**evaluation) for evaluation in content["curve"]),
        )
        return state, dict(content["settings"])
    except (OSError, RuntimeError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a training checkpoint ({one_line(error)}): delete it and "
            "train again"
        ) from None


def fitted(state: Training, fresh: Training, path: Path) -> Training:
    """A loaded state with its arrays in the order of `fresh`, which the last bits of sums over them
    depend on.

    Raises CheckpointError unless both have the same names, shapes and types.
    """
    for kind in ("parameters", "optimizer"):
        ours, theirs = (
            {name: (array.shape, array.dtype) for name, array in getattr(one, kind).items()}
            for one in (fresh, state)
        )
        if ours != theirs:
            odd = sorted(set(ours.items()) ^ set(theirs.items()), key=str)[0][0]
            raise CheckpointError(f"{path} does not fit these settings: its {kind} {odd} differs")
    orders = dict.fromkeys(_ARRAYS, fresh.parameters) | {"optimizer": fresh.optimizer}
    ordered: dict[str, Any] = {}
    for kind, order in orders.items():
        arrays = getattr(state, kind)
        ordered[kind] = {name: arrays[name] for name in order if name in arrays}
    return replace(state, **ordered)
