"""The base's activations that a new stage is trained on: stored once, or computed for each batch.

- in: a model whose last stage is new, texts
- out: `Hidden` for a batch: the residual stream, the embedded text and the backout at the base's
  last boundary
- a store is a folder of memory-mapped arrays, with the positions of all texts joined without
  padding. A value is an integer of 16 or 8 bits; each group of `GROUP` channels of a position has a
  float32 scale, its largest magnitude
- the caller decides where a store goes, and makes sure that it is complete
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from cognica_mlx.cache.hidden import Hidden
from cognica_mlx.errors import CheckpointError
from cognica_mlx.network.model import PoEModel
from cognica_mlx.training.batches import Batch, Batches, Text

GROUP = 64
STORE_BITS = (16, 8)
_TYPES = {16: mx.int16, 8: mx.int8}
_NUMPY = {16: np.int16, 8: np.int8}
PARTS = ("x", "x0", "backout")
DESCRIPTION = "store.json"
# Positions that the base runs at once while a store is written.
CHUNK = 4096


class Activations(Protocol):
    """A source of activations for batches."""

    def read(self, batch: Batch) -> Hidden:
        """The base's last boundary for a batch (B, T). Padding holds arbitrary finite values."""


class LiveBase:
    """The base itself, run for every batch."""

    def __init__(self, model: PoEModel):
        self._model = model

    def read(self, batch: Batch) -> Hidden:
        """See `Activations`."""
        return below(self._model, mx.array(batch.tokens))


def below(model: PoEModel, tokens: mx.array) -> Hidden:
    """The input of the last stage of `model` for tokens (B, T)."""
    return model.boundaries(tokens, model.poe_n_stages - 2)[-1]


def encode(values: mx.array, bits: int) -> tuple[mx.array, mx.array]:
    """Values (..., D) as integers of `bits` bits (..., D), and scales (..., G) float32."""
    width, most = values.shape[-1], 2 ** (bits - 1) - 1
    grouped = values.astype(mx.float32).reshape(*values.shape[:-1], groups(width), -1)
    scales = mx.abs(grouped).max(axis=-1) / most
    steps = mx.round(grouped / mx.maximum(scales, 1e-30)[..., None])
    return steps.astype(_TYPES[bits]).reshape(values.shape), scales


def decode(integers: mx.array, scales: mx.array, dtype: mx.Dtype) -> mx.array:
    """The values (..., D) that `encode` rounded, to within half a step. A step is a group's largest
    magnitude divided by 32767 (16 bits) or 127 (8 bits)."""
    grouped = integers.reshape(*scales.shape, -1).astype(mx.float32)
    return (grouped * scales[..., None]).reshape(integers.shape).astype(dtype)


def groups(width: int) -> int:
    """The number of scales for a position of `width` channels."""
    return width // GROUP if width % GROUP == 0 else 1


def store_bytes(texts: Sequence[Text], width: int, bits: int) -> int:
    """Bytes that a store of `texts` takes on disk, apart from a few headers."""
    positions = sum(map(len, texts))
    return positions * len(PARTS) * (width * bits // 8 + 4 * groups(width))


def write_store(
    folder: Path,
    model: PoEModel,
    texts: Sequence[Text],
    bits: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Run the base over `texts` and write the last stage's input to an existing folder.

    `progress` is called with the number of positions of every batch done. Raises CheckpointError
    if an activation is not finite, OSError if the disk is full.
    """
    width, starts = model.config.n_embd, _starts(texts)
    positions, longest = int(starts[-1]), max(map(len, texts))
    with ExitStack() as opened:
        files: dict[str, _Rows] = {}
        for name in PARTS:
            for key, kind, count in (
                (name, _NUMPY[bits], width),
                (f"{name}.scales", np.float32, groups(width)),
            ):
                rows = _Rows(folder / f"{key}.npy", kind, (positions, count))
                files[key] = opened.enter_context(rows)
        for batch in Batches(texts, max(CHUNK // longest, 1), seed=0).in_order():
            hidden = below(model, mx.array(batch.tokens))
            encoded = {name: encode(getattr(hidden, name), bits) for name in PARTS}
            mx.eval(encoded)
            there = [(row, i) for row, i in enumerate(batch.which) if i >= 0]
            for name, (integers, scales_of) in encoded.items():
                both = ((name, np.array(integers)), (f"{name}.scales", np.array(scales_of)))
                for key, values in both:
                    for row, i in there:
                        part = values[row, : len(texts[i])]
                        if part.dtype == np.float32 and not np.isfinite(part).all():
                            raise CheckpointError(
                                "the base's activations contain a value that is not finite: are "
                                "its weights damaged?"
                            )
                        files[key].write(starts[i], part)
            if progress:
                progress(sum(len(texts[i]) for _, i in there))
    description = {"positions": positions, "n_embd": width, "bits": bits}
    (folder / DESCRIPTION).write_text(json.dumps(description) + "\n", encoding="utf-8")


class _Rows:
    """A .npy file of `shape`, to be filled in any order. It is written rather than mapped: on a
    full disk, writing to a map kills the process."""

    def __init__(self, path: Path, kind: Any, shape: tuple[int, ...]):
        self._file = path.open("xb")
        fields = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, fields)
        self._start, self._stride = self._file.tell(), np.dtype(kind).itemsize * shape[1]

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, row: int, values: np.ndarray) -> None:
        self._file.seek(self._start + int(row) * self._stride)
        self._file.write(np.ascontiguousarray(values).data)


def _starts(texts: Sequence[Text]) -> np.ndarray:
    return np.cumsum([0, *map(len, texts)])


class StoredActivations:
    """A store's activations, read as batches need them; only one batch is in memory."""

    def __init__(self, folder: Path, texts: Sequence[Text], width: int, bits: int, dtype: mx.Dtype):
        """`texts` are the texts that the store was made from.

        Raises CheckpointError naming the file that is missing, damaged or has another shape.
        """
        self._texts, self._starts, self._dtype = texts, _starts(texts), dtype
        positions = int(self._starts[-1])
        self._arrays: dict[str, np.ndarray] = {}
        for name in PARTS:
            self._arrays[name] = _open(folder / f"{name}.npy", _NUMPY[bits], (positions, width))
            path = folder / f"{name}.scales.npy"
            scales = (positions, groups(width))
            self._arrays[f"{name}.scales"] = _open(path, np.float32, scales)

    def read(self, batch: Batch) -> Hidden:
        """See `Activations`."""
        tokens = mx.array(batch.tokens)
        parts = [
            decode(self._gather(name, batch), self._gather(f"{name}.scales", batch), self._dtype)
            for name in PARTS
        ]
        return Hidden(tokens, *parts)

    def _gather(self, name: str, batch: Batch) -> mx.array:
        source = self._arrays[name]
        padded = np.zeros((*batch.tokens.shape, source.shape[1]), source.dtype)
        for row, i in enumerate(batch.which):
            if i >= 0:
                length = len(self._texts[i])
                padded[row, :length] = source[self._starts[i] : self._starts[i] + length]
        return mx.array(padded)


def _open(path: Path, kind: Any, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is missing or damaged ({error}): delete its folder to have it made again"
        ) from None
    if array.dtype != kind or array.shape != shape:
        raise CheckpointError(
            f"{path} holds {array.dtype} {array.shape}, not {np.dtype(kind)} {shape}: delete its "
            "folder to have it made again"
        )
    plain: np.ndarray = array.view(np.ndarray)  # np.memmap's own indexing is slow
    return plain
