"""Reads and writes safetensors files: a folder's tensors by name, one at a time.

- in: files are checked to be complete before any is used; an index may only name plain files, no
  paths, so it cannot point outside its folder
- out: files are laid out first and then written tensor by tensor, so that a model may be larger
  than memory; an index lists them
- it knows nothing about what the tensors mean
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path, PurePath
from typing import Any

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from cognica_mlx.errors import CheckpointError, one_line
from cognica_mlx.files import strict_json
from cognica_mlx.files.git_lfs import pointer_problem
from cognica_mlx.files.stored import StoredTensor, raw

SHARD_BYTES = 5 * 10**9  # as in mlx-lm and on the hub

_MLX_TYPES = (mx.float32, mx.bfloat16, mx.float16, mx.uint32, mx.uint8)
_TYPE_NAMES = dict(zip(_MLX_TYPES, ("F32", "BF16", "F16", "U32", "U8"), strict=True))

# A tensor to write: its name, shape and type.
Spec = tuple[str, tuple[int, ...], mx.Dtype]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError if the file is missing or not a JSON object."""
    try:
        content = strict_json.read(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        problem = pointer_problem(path) or f"cannot be read as JSON: {error}"
        raise CheckpointError(f"{path} {problem}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return content


def read_tensors(folder: Path, stem: str) -> dict[str, StoredTensor]:
    """The tensors of `<stem>.safetensors`, or of its shards, unread.

    Raises CheckpointError naming the file that is missing, truncated or damaged, or a tensor that
    the index lists but no shard contains.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if (folder / f"{stem}.safetensors").is_file():
        return _read_file(folder / f"{stem}.safetensors")
    if not index.is_file():
        raise CheckpointError(f"{folder} holds no {stem}.safetensors and no {index.name}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted({str(name) for name in weight_map.values()}):
        if shard in ("", ".", "..") or PurePath(shard).name != shard or "\\" in shard:
            raise CheckpointError(
                f"{index} names the shard {shard!r}, which is not a plain file name"
            )
        held = _read_file(folder / shard)
        tensors |= {name: held[name] for name in held if weight_map.get(name, shard) == shard}
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{index} lists {name} in {shard}, which does not hold it")
    return tensors


def _read_file(path: Path) -> dict[str, StoredTensor]:
    """A checked file's tensors, whose arrays are returned one by one and not kept."""

    def load() -> dict[str, mx.array]:
        arrays = mx.load(str(path), format="safetensors")
        assert isinstance(arrays, dict)
        return arrays

    def read(name: str) -> mx.array:
        # An array left in the dictionary would keep its values in memory once they are read.
        if name not in unread:
            unread.update(load())
        return unread.pop(name)

    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        # Checks the header against the file's true length; mx.load does so only on reading.
        with safe_open(path, framework="np"):
            pass
        unread = load()
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        damage = f"is damaged or incomplete ({one_line(error)}): download it again"
        raise CheckpointError(f"{path} {pointer_problem(path) or damage}") from None
    if not unread:
        raise CheckpointError(f"{path} holds no tensors")
    return {k: StoredTensor(a.shape, a.dtype, partial(read, k)) for k, a in unread.items()}


def lay_out(specs: Iterable[Spec], stem: str, most: int = SHARD_BYTES) -> dict[str, list[Spec]]:
    """Tensors by file, in order; a file exceeds `most` bytes only if it has a single tensor."""
    shards: list[list[Spec]] = [[]]
    room = most
    for spec in specs:
        if shards[-1] and nbytes(spec) > room:
            shards.append([])
            room = most
        shards[-1].append(spec)
        room -= nbytes(spec)
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    count = len(shards)
    return {f"{stem}-{i:05d}-of-{count:05d}.safetensors": s for i, s in enumerate(shards, start=1)}


def nbytes(spec: Spec) -> int:
    """Bytes that a tensor's values take."""
    _, shape, dtype = spec
    return prod(shape) * dtype.size


def write_index(folder: Path, stem: str, layout: Mapping[str, Sequence[Spec]]) -> None:
    """Write `<stem>.safetensors.index.json`, which maps tensors to files."""
    total = sum(nbytes(spec) for specs in layout.values() for spec in specs)
    weight_map = {name: file for file, specs in layout.items() for name, _, _ in specs}
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    strict_json.write(folder / f"{stem}.safetensors.index.json", content)


def write_arrays(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str]) -> None:
    """Write a file from memory. Raises OSError if it cannot be written whole."""
    try:
        mx.save_safetensors(str(path), arrays, metadata)
        with safe_open(path, framework="np"):
            pass  # a full disk may leave a short file without an error
    except (RuntimeError, SafetensorError) as error:
        reason = f"is the disk full? ({one_line(error)})"
        raise OSError(errno.EIO, reason, str(path)) from None


class TensorWriter:
    """Writes a safetensors file one tensor at a time, in the order laid out."""

    def __init__(self, path: Path, specs: Sequence[Spec]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
        start = 0
        for spec in specs:
            name, shape, dtype = spec
            end = start + nbytes(spec)
            header[name] = {
                "dtype": _TYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
            start = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # the values start at a multiple of 8 bytes
        self._due = list(reversed(specs))
        self._file = path.open("xb")
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, name: str, array: mx.array) -> None:
        """Evaluate `array` and append it; it must be the next in the layout."""
        due = self._due.pop()
        if due != (name, array.shape, array.dtype):
            raise ValueError(f"{name} {array.shape} {array.dtype} was written, but {due} is next")
        self._file.write(raw(array))

    def close(self) -> None:
        """Close the file. Raises ValueError if a tensor has not been written."""
        self._file.close()
        if self._due:
            raise ValueError(f"{self._file.name} was closed before {self._due[-1][0]} was written")
