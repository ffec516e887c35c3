"""Reads PyTorch checkpoints: a `.pt` file's tensors by name, without PyTorch or trust in the file.

- In: a state dict as written by `torch.save`: a zip of one pickle and the raw storages of float32,
  bfloat16 or float16 tensors, plain or as Parameters.
- Out: names and shapes at once; each tensor on demand, copied from the mapped file. The file must
  not change while its tensors are in use.
- No unpickler runs: `plain_pickle` interprets the few instructions that a state dict needs. Any
  other instruction, and any other global, is refused by name.
- Nothing is decompressed, extracted or trusted: sizes, offsets and strides are checked against the
  file before a tensor is read.
- Anything wrong with a file raises one CheckpointError that names it.
"""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from cognica_mlx.convert.formats.plain_pickle import (
    CONSTANTS,
    NUMBERS,
    TEXT,
    TUPLES,
    Global,
    replay,
)
from cognica_mlx.errors import CheckpointError, one_line
from cognica_mlx.files.git_lfs import pointer_problem
from cognica_mlx.files.stored import StoredTensor

MOST_DIRECTORY_BYTES = 4 * 2**20  # 300 storages take 30 thousand bytes
MOST_PICKLE_BYTES = 16 * 2**20  # and 30 thousand in the pickle
MOST_STEPS = 1_000_000  # a tensor takes 40 pickle instructions
MOST_AXES = 32  # numpy's limit before 2.0
# Shared and expanded tensors may be larger than the file, within these limits.
MOST_GROWTH, GROWTH_ROOM = 4, 64 * 2**20

_STORAGES = {
    "torch.FloatStorage": mx.float32,
    "torch.BFloat16Storage": mx.bfloat16,
    "torch.HalfStorage": mx.float16,
}
_ORDERED_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_NAMES = frozenset({*_STORAGES, _ORDERED_DICT, _TENSOR, _PARAMETER})

_VALUES = TEXT | NUMBERS | CONSTANTS.keys() | TUPLES.keys() | {"TUPLE"}
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip entry: signature, lengths of name and extra


class _Storage(NamedTuple):
    """A storage: its first byte in the file, its number of elements, their type."""

    start: int
    numel: int
    dtype: mx.Dtype


class _Tensor(NamedTuple):
    """A tensor's view of its storage, in elements; arbitrary values until `_check` has run."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """A `.pt` file's tensors by name, in its order, unread; the file is memory-mapped.

    Raises CheckpointError, naming the file, if anything is missing, damaged, unreadable or refused;
    reading a tensor cannot fail after that.
    """
    try:
        archive = _Archive(path)
        start, size = archive.record("data.pkl", MOST_PICKLE_BYTES)
        content = _replay(archive.data[start : start + size], archive.storage)
        tensors = _select(content, len(archive.data))
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error.__cause__
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # zipfile, pickletools and bad stacks can raise anything
        raise CheckpointError(
            f"{path} is damaged or not a PyTorch checkpoint ({one_line(error)}): download it again"
        ) from error
    return {
        name: StoredTensor(tensor.shape, tensor.storage.dtype, partial(_read, archive.data, tensor))
        for name, tensor in tensors.items()
    }


def _read(data: mmap.mmap, tensor: _Tensor) -> mx.array:
    """A copy of a checked tensor in a mapped file."""
    (start, _, dtype), offset, shape, strides = tensor
    if 0 in shape:
        return mx.zeros(shape, dtype)
    width = dtype.size
    steps = tuple(stride * width for stride in strides)
    # As raw bits: numpy has no bfloat16, and NaNs keep their payload.
    bits: np.ndarray[Any, Any] = np.ndarray(
        shape, f"<u{width}", data, start + offset * width, steps
    )
    # Most tensors are aligned and contiguous: then `require` copies nothing, mx.array once.
    array = mx.array(np.require(bits, requirements=["C", "A"])).view(dtype)
    if hasattr(mmap, "MADV_DONTNEED"):
        # Otherwise the pages read count as this process's memory while the file is mapped.
        data.madvise(mmap.MADV_DONTNEED)
    return array


class _Archive:
    """A zip written by torch.save: the mapped file, and where each record is in it."""

    def __init__(self, path: Path) -> None:
        if not path.is_file() or not path.stat().st_size:
            raise CheckpointError("is empty" if path.is_file() else "is missing or not a file")
        if problem := pointer_problem(path):
            raise CheckpointError(problem)
        with _CarefulFile(path) as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if self.data[:1] == b"\x80":
                raise CheckpointError(
                    "is a bare pickle, PyTorch's format before 1.6, which is not supported:"
                    " if you trust it, load and save it again with a recent PyTorch"
                )
            try:
                with zipfile.ZipFile(file) as archive:
                    entries = archive.infolist()
            except zipfile.BadZipFile as error:
                zipped = self.data[:2] == b"PK"
                what = "is truncated or damaged" if zipped else "is not a checkpoint"
                raise CheckpointError(f"{what} ({error}): download it again") from error
        roots = [e.filename[:-9] for e in entries if e.filename.partition("/")[2] == "data.pkl"]
        if len(roots) != 1 or not roots[0]:
            raise CheckpointError("does not hold one data.pkl, so torch.save did not write it")
        self._entries: dict[str, zipfile.ZipInfo] = {}
        for entry in entries:
            root, *inner = entry.filename.split("/")
            if root != roots[0] or ".." in (root, *inner) or "\\" in entry.filename:
                raise CheckpointError(f"holds {_shown(entry.filename)}, which is outside its root")
            if "/".join(inner) in self._entries:
                raise CheckpointError(f"holds {_shown(entry.filename)} twice")
            self._entries["/".join(inner)] = entry
        if "byteorder" in self._entries:  # absent before PyTorch 2.1
            start, size = self.record("byteorder", 16)
            if self.data[start : start + size] != b"little":
                raise CheckpointError("is not in little-endian byte order")

    def record(self, name: str, most: int) -> tuple[int, int]:
        """The first byte and the size of an uncompressed record that is whole and within `most`."""
        if name not in self._entries:
            raise CheckpointError(f"lacks its record {_shown(name)}")
        entry = self._entries[name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise CheckpointError(
                f"has {_shown(name)} compressed or encrypted, which torch.save never does:"
                " pack it again without compression"
            )
        start, size = entry.header_offset, entry.file_size
        if size > most or size != entry.compress_size:
            raise CheckpointError(f"claims {size} bytes for {_shown(name)}, which is impossible")
        if 0 <= start <= len(self.data) - _LOCAL_HEADER.size:
            # Only the entry's own header says where its data starts, because torch.save pads it.
            signature, *lengths = _LOCAL_HEADER.unpack_from(self.data, start)
            start += _LOCAL_HEADER.size + sum(lengths)
            if signature == b"PK\x03\x04" and start + size <= len(self.data):
                return start, size
        raise CheckpointError(f"has no complete record {_shown(name)} where its directory says")

    def storage(self, key: object) -> _Storage:
        """The storage of a persistent id: ("storage", class, record, device, numel)."""
        if type(key) is not tuple or [type(k) for k in key] != [str, Global, str, str, int]:
            raise ValueError("a persistent id is not a storage's")
        kind, (cls,), number, _, numel = key
        if kind != "storage" or cls not in _STORAGES:
            raise ValueError("a persistent id is not a storage's")
        record, dtype = f"data/{number}", _STORAGES[cls]
        start, size = self.record(record, len(self.data))
        if numel * dtype.size != size:
            raise CheckpointError(
                f"has {size} bytes in {_shown(record)}, which its tensors do not fit"
            )
        return _Storage(start, numel, dtype)


class _CarefulFile(io.FileIO):
    """Limits zipfile, which would read a directory of any size and take far more memory for it."""

    def read(self, size: int | None = -1, /) -> bytes:
        """As FileIO, up to MOST_DIRECTORY_BYTES; zipfile omits the size only to read the end."""
        if size is not None and size > MOST_DIRECTORY_BYTES:
            raise CheckpointError("has a zip directory far larger than a checkpoint needs")
        return super().read(size) or b""


def _replay(data: bytes, storage: Callable[[object], _Storage]) -> object:
    """The pickle in `data` as plain values, Globals and _Tensors."""
    made = replay(
        data,
        kind="state dict",
        error=CheckpointError,
        most_steps=MOST_STEPS,
        values=_VALUES,
        names=_NAMES,
        rules={"BINPERSID": storage, "REDUCE": _rebuild, "BUILD": _keep},
    )
    if len(made) != 1:
        raise ValueError("the pickle does not leave exactly one value")
    return made[0]


def _keep(target: object, state: object) -> object:
    """Drop the attribute that a Module's state_dict() sets, its parts' versions."""
    if type(target) is not OrderedDict or type(state) is not dict:
        raise CheckpointError("sets an object's attributes: refused, nothing was run")
    return target


def _rebuild(function: object, args: object) -> object:
    """The result of a call: an empty OrderedDict, or a tensor."""
    if type(function) is not Global or type(args) is not tuple:
        raise ValueError("it calls something that is not a function")
    if function.name == _ORDERED_DICT and not args:
        return OrderedDict()
    if function.name == _TENSOR and len(args) == 6:
        return _Tensor(*args[:4])
    if function.name == _TENSOR and len(args) == 7:  # such as a lazy negation
        raise CheckpointError("holds a tensor with extra metadata: save its clone() instead")
    if function.name == _PARAMETER and len(args) == 3 and type(args[0]) is _Tensor:
        return args[0]
    raise CheckpointError(f"calls {function.name} in an unknown way: refused, nothing was run")


def _select(content: object, length: int) -> dict[str, _Tensor]:
    """The tensors of the dictionary `content`, checked; `length` is the file's."""
    if not isinstance(content, dict):
        raise CheckpointError("does not hold a dictionary of tensors")
    tensors: dict[str, _Tensor] = {}
    for name, value in content.items():
        if type(value) is _Tensor:
            tensors[name] = _check(value, f"has a tensor {_shown(name)}")
        elif not isinstance(value, str | int | float | None):
            kind = type(value).__name__.lstrip("_")
            raise CheckpointError(f"holds {_shown(name)}, a {kind} and not a tensor")
    if not tensors:
        raise CheckpointError("holds no tensors")
    total = sum(prod(t.shape) * t.storage.dtype.size for t in tensors.values())
    if total > MOST_GROWTH * length + GROWTH_ROOM:
        raise CheckpointError(f"would expand its {length} bytes into far larger tensors: refused")
    return tensors


def _check(tensor: _Tensor, what: str) -> _Tensor:
    """`tensor`, checked to lie within its storage; `what` begins the error messages."""
    storage, offset, shape, strides = tensor
    if type(storage) is not _Storage or type(shape) is not tuple or type(strides) is not tuple:
        raise CheckpointError(f"{what} that is malformed")
    if len(shape) != len(strides) or len(shape) > MOST_AXES:
        raise CheckpointError(f"{what} with damaged axes")
    if any(type(n) is not int or n < 0 for n in (offset, *shape, *strides)):
        raise CheckpointError(f"{what} with a size or stride that is not a whole number >= 0")
    if any(n >= 2**31 for n in shape):
        raise CheckpointError(f"{what} with an axis longer than MLX allows")
    # The stride of an axis of one element has no meaning and may be anything.
    strides = tuple(s if n > 1 else 0 for n, s in zip(shape, strides, strict=True))
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.numel:
        raise CheckpointError(f"{what} that exceeds its storage of {storage.numel} elements")
    return _Tensor(storage, offset, shape, strides)


def _shown(name: str) -> str:
    return ascii(name[:120])
