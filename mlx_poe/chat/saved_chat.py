"""Conversations in files: one safetensors file holds the turns, the settings and the state.

- in: a path, or a chat to save
- out: a chat with every field checked for type and range, or a CheckpointError
- the caller checks whether settings and state fit a model

A saved chat may come from anywhere, so it is trusted no more than a checkpoint. Invalid text or
settings are an error. The arrays carry a checksum; if it does not match, they are left out, and the
conversation can be run again from its text.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import mlx.core as mx

from cognica_mlx.decoding.modes import ModeOptions
from cognica_mlx.decoding.sampling import SamplingOptions
from cognica_mlx.errors import CheckpointError, PoEError
from cognica_mlx.files.git_lfs import pointer_problem
from cognica_mlx.files.safetensors_files import write_arrays
from cognica_mlx.files.whole_file import replacing
from mlx_poe.chat.turns import Settings, Turn
from mlx_poe.generation.tools import read_functions

_FORMAT = "cognica-mlx chat 2"
# Version 0.1 wrote no stop texts, functions or checksum.
_FORMATS = ("cognica-mlx chat 1", _FORMAT)
_PLACEHOLDER = "empty"  # a safetensors file needs an array
_OPTION_TYPES = {**get_type_hints(SamplingOptions), **get_type_hints(ModeOptions)}

T = TypeVar("T")


@dataclass(frozen=True)
class SavedChat:
    """The content of a file. `revisions` are the hub commits of the base and of the specialist in
    use. `arrays` and `state` come from `saved_state.to_arrays`; `probe` is a
    few of the model's logits, by which the caller can tell which model the state belongs to."""

    model: str
    settings: Settings
    turns: list[Turn]
    revisions: list[str | None]
    probe: Any
    state: dict[str, Any]
    arrays: dict[str, mx.array]


def write_chat(path: Path, chat: SavedChat) -> None:
    """Write `chat` to `path`, whole or not at all, readable for the user alone. CheckpointError if
    that fails."""
    content = {
        "format": _FORMAT,
        "model": chat.model,
        "settings": asdict(chat.settings),
        "turns": [asdict(turn) for turn in chat.turns],
        "revisions": chat.revisions,
        "probe": chat.probe,
        "state": chat.state,
        "checksum": _checksum(chat.arrays),
    }
    # As ASCII, which can also hold half a surrogate pair; UTF-8 cannot.
    metadata = {"chat": json.dumps(content)}
    arrays = chat.arrays or {_PLACEHOLDER: mx.zeros((1,))}
    try:
        # MLX appends .safetensors to any other name.
        with replacing(path, suffix=".safetensors", private=True) as temporary:
            write_arrays(temporary, arrays, metadata)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise CheckpointError(f"{path} cannot be written: {reason}") from None


def read_chat(path: Path) -> SavedChat:
    """Read a file written by `write_chat`. CheckpointError for anything else."""
    arrays, content = _load(path)
    try:
        settings = _settings(content.get("settings"))
        listed = content.get("turns")
        if not isinstance(listed, list):
            raise ValueError("its turns are not a list")
        turns = [_build(Turn, turn, f"turn {number}") for number, turn in enumerate(listed, 1)]
    except (PoEError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is a damaged chat: {_first_line(error)}") from None
    state = content.get("state")
    if not isinstance(state, dict) or content.get("checksum") != _checksum(arrays):
        state, arrays = {}, {}
    model = content.get("model")
    revisions: Any = content.get("revisions")  # absent before version 0.3
    if not _fits(revisions, list[str | None]) or len(revisions) != 2:
        revisions = [None, None]
    return SavedChat(str(model), settings, turns, revisions, content.get("probe"), state, arrays)


def _load(path: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The arrays of a safetensors file, and the JSON object in its metadata."""
    try:
        if not path.is_file():
            missing = "is not a regular file" if path.exists() else "is missing"
            raise CheckpointError(f"{path} {missing}")
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        arrays, metadata = loaded
        content = json.loads(metadata["chat"])
        if not isinstance(content, dict) or content.get("format") not in _FORMATS:
            raise ValueError("its format is unknown")
        mx.eval(arrays)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, RecursionError) as error:
        problem = pointer_problem(path) or f"is not a saved chat: {_first_line(error)}"
        raise CheckpointError(f"{path} {problem}") from None
    arrays.pop(_PLACEHOLDER, None)
    return arrays, content


def _settings(content: Any) -> Settings:
    settings = _build(Settings, content, "its settings")
    for name, value in settings.options.items():
        if name not in _OPTION_TYPES:
            raise ValueError(f"there is no option {name!r:.40}")
        if not _fits(value, _OPTION_TYPES[name]):
            raise ValueError(f"option {name} cannot be {value!r:.40}")
    if settings.max_tokens < 1:
        raise ValueError("max_tokens is below 1")
    if not all(settings.stop):
        raise ValueError("a stop text is empty")
    if settings.functions:
        settings.functions = read_functions(settings.functions)
    return settings


def _build(cls: type[T], content: Any, where: str) -> T:
    """A dataclass from a JSON object. ValueError unless all fields are there, with their types."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}: not an object")
    kinds = get_type_hints(cls)
    for name, value in content.items():
        if name not in kinds:
            raise ValueError(f"{where}: there is no {name!r:.40}")
        if not _fits(value, kinds[name]):
            raise ValueError(f"{where}: {name} cannot be {value!r:.40}")
    for each in fields(cls):  # type: ignore[arg-type]
        optional = each.default is not MISSING or each.default_factory is not MISSING
        if not optional and each.name not in content:
            raise ValueError(f"{where}: {each.name} is missing")
    return cls(**content)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON has the annotated type; a whole number counts as a float."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin in (list, Sequence):
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(_fits(item, parts[1]) for item in value.values())
    if kind is Any:
        return True
    if kind is float and type(value) is int:
        return abs(value) <= sys.float_info.max
    return type(value) is kind


def _checksum(arrays: Mapping[str, mx.array]) -> str:
    checksum = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        checksum.update(f"{name} {array.shape} {array.dtype}\n".encode())
        checksum.update(memoryview(array.reshape(-1).view(mx.uint8)))  # type: ignore[arg-type]
    return checksum.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
