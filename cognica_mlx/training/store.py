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
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from cognica_mlx.cache.hidden import Hidden
from cognica_mlx.errors import CheckpointError
from cognica_mlx.network.model import PoEModel
from cognica_mlx.training.batches import Batch, Batches, Text

GROUP = 64
STORE_BITS = (16, 8)
_TYPES = {16: mx.int16, 8: mx.int8}
PARTS = ("x", "x0", "backout")
DESCRIPTION = "store.json"
# Positions that the base runs at once while a store is written.
CHUNK = 4096


class LiveBase:
    """The base itself, run for every batch."""

    def __init__(self, model: PoEModel):
        self._model = model

    def read(self, batch: Batch) -> Hidden:
        """The base's last boundary for a batch (B, T)."""
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
        # Written rather than mapped: on a full disk, writing to a map kills the process.
        files: dict[str, tuple[BinaryIO, int]] = {}
        for name, (kind, shape) in _layout(positions, width, bits).items():
            new = opened.enter_context((folder / f"{name}.npy").open("xb"))
            fields = {"descr": kind.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(new, fields)
            files[name] = new, new.tell()
        for batch in Batches(texts, max(CHUNK // longest, 1), seed=0).in_order():
            hidden = below(model, mx.array(batch.tokens))
            encoded: dict[str, mx.array] = {}
            for name in PARTS:
                encoded[name], scales = encode(getattr(hidden, name), bits)
                encoded[f"{name}.scales"] = scales
            mx.eval(encoded)
            there = [(row, i) for row, i in enumerate(batch.which) if i >= 0]
            for name, (file, begin) in files.items():
                values = np.array(encoded[name])
                for row, i in there:
                    part = values[row, : len(texts[i])]
                    if part.dtype == np.float32 and not np.isfinite(part).all():
                        raise CheckpointError(
                            "the base's activations contain a value that is not finite: are its "
                            "weights damaged?"
                        )
                    file.seek(begin + int(starts[i]) * part.itemsize * part.shape[1])
                    file.write(np.ascontiguousarray(part).data)
            if progress:
                progress(sum(len(texts[i]) for _, i in there))
    description = {"positions": positions, "n_embd": width, "bits": bits}
    (folder / DESCRIPTION).write_text(json.dumps(description) + "\n", encoding="utf-8")


def _layout(
    positions: int, width: int, bits: int
) -> dict[str, tuple[np.dtype[Any], tuple[int, int]]]:
    """A store's arrays by name: their types and shapes."""
    scales = np.dtype(np.float32), (positions, groups(width))
    both = {"": (np.dtype(f"int{bits}"), (positions, width)), ".scales": scales}
    return {f"{part}{end}": about for part in PARTS for end, about in both.items()}


def _starts(texts: Sequence[Text]) -> np.ndarray:
    return np.cumsum([0, *map(len, texts)])


class StoredActivations:
    """A store's activations, read as batches need them; only one batch is in memory."""

    def __init__(self, folder: Path, texts: Sequence[Text], width: int, bits: int, dtype: mx.Dtype):
        """`texts` are the texts that the store was made from.

        Raises CheckpointError naming the file that is missing, damaged or has another shape.
        """
        self._texts, self._starts, self._dtype = texts, _starts(texts), dtype
        layout = _layout(int(self._starts[-1]), width, bits)
        self._arrays = {n: _open(folder / f"{n}.npy", *about) for n, about in layout.items()}

    def read(self, batch: Batch) -> Hidden:
        """The base's last boundary for a batch (B, T), with zeros as padding."""
        gathered: dict[str, mx.array] = {}
        for name, source in self._arrays.items():
            padded = np.zeros((*batch.tokens.shape, source.shape[1]), source.dtype)
            for row, i in enumerate(batch.which):
                if i >= 0:
                    length = len(self._texts[i])
                    padded[row, :length] = source[self._starts[i] : self._starts[i] + length]
            gathered[name] = mx.array(padded)
        parts = [decode(gathered[n], gathered[f"{n}.scales"], self._dtype) for n in PARTS]
        return Hidden(mx.array(batch.tokens), *parts)


Activations = LiveBase | StoredActivations


def _open(path: Path, kind: np.dtype[Any], shape: tuple[int, int]) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is missing or damaged ({error}): delete its folder to have it made again"
        ) from None
    if array.dtype != kind or array.shape != shape:
        raise CheckpointError(
            f"{path} holds {array.dtype} {array.shape}, not {kind} {shape}: delete its folder to "
            "have it made again"
        )
    plain: np.ndarray = array.view(np.ndarray)  # np.memmap's own indexing is slow
    return plain
