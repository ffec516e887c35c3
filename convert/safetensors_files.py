"""Safetensors in: a folder's tensors by name, lazily, after the files have been proved whole.

Nothing here knows what the tensors mean. Shards are plain file names inside the folder, never
paths, so an index cannot lead out of it.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from cognica_mlx.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError where it is missing or is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return content


def read_tensors(folder: Path, stem: str) -> dict[str, mx.array]:
    """The tensors of `<stem>.safetensors`, or of its shards, unevaluated.

    Raises CheckpointError naming the file that is missing, truncated or damaged, and a tensor
    that its index promises and no shard holds.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if (folder / f"{stem}.safetensors").is_file():
        return _read_file(folder / f"{stem}.safetensors")
    if not index.is_file():
        raise CheckpointError(f"{folder} holds no {stem}.safetensors and no {index.name}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    tensors: dict[str, mx.array] = {}
    for shard in sorted({str(name) for name in weight_map.values()}):
        if shard in ("", ".", "..") or PurePath(shard).name != shard or "\\" in shard:
            raise CheckpointError(
                f"{index} names the shard {shard!r}, which is not a plain file name"
            )
        tensors.update(_read_file(folder / shard))
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{index} promises {name} in {shard}, which does not hold it")
    return tensors


def _read_file(path: Path) -> dict[str, mx.array]:
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        # Checks the header against the file's true length, which mx.load does only when read.
        with safe_open(path, framework="np"):
            pass
        tensors = mx.load(str(path), format="safetensors")
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path} is damaged or not whole ({reason}); fetch it again"
        ) from None
    assert isinstance(tensors, dict)
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    return tensors
