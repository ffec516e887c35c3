"""A state of training in one safetensors file: whole or absent.

- in: a `Training` and the settings that it belongs to, as JSON can hold them
- out: the same, checked against a fresh state before it is used
- it holds weights, optimiser, gradients that wait for an update, the best weights so far and the
  loss curve. The data's order and the learning rate follow from the iteration, so no generator's
  state is needed
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from cognica_mlx import whole_file
from cognica_mlx.errors import CheckpointError, one_line
from cognica_mlx.training.trainer import Evaluation, Training

VERSION = 1
_ARRAYS = ("parameters", "optimizer", "gradients", "best")
_NUMBERS = ("iteration", "counted", "best_iteration", "loss", "loss_tokens")


def save_training(path: Path, state: Training, settings: dict[str, Any]) -> None:
    """Write the file; CheckpointError, keeping what was there, where the disk does not take it."""
    arrays = {
        f"{kind}/{name}": array for kind in _ARRAYS for name, array in getattr(state, kind).items()
    }
    fields = {name: getattr(state, name) for name in _NUMBERS}
    curve = [asdict(evaluation) for evaluation in state.curve]
    content = {"version": VERSION, "settings": settings, "curve": curve, **fields}
    try:
        with whole_file.replacing(path, ".safetensors") as temporary:
            mx.save_safetensors(str(temporary), arrays, {"training": json.dumps(content)})
            with safe_open(temporary, framework="np"):
                pass  # a full disk may leave a short file without an error
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {one_line(error)}") from None


def read_training(path: Path) -> tuple[Training, dict[str, Any]]:
    """The state and the settings in a file that `save_training` wrote.

    Raises CheckpointError where there is none, or it is damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: there is nothing to go on from")
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
            f"{path} is damaged or not a checkpoint of training ({one_line(error)}): delete it and "
            "train anew"
        ) from None


def fitted(state: Training, fresh: Training, path: Path) -> Training:
    """A state that was read, its arrays in the order of those in `fresh`: sums go by that order, so
    their last bits do.

    Raises CheckpointError unless they are of the same names, shapes and types.
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
