"""Where activation stores are, and which one belongs to which texts and base.

A store's name is a hash of everything that its content depends on, so an existing store is always
the right one. It appears whole or not at all, and only the user can read it: texts can be recovered
from activations.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from cognica_mlx.convert.checkpoint import Checkpoint
from cognica_mlx.convert.formats.whole_folder import check_room, new_folder, remove_leftovers
from cognica_mlx.errors import CheckpointError, PoEError
from cognica_mlx.files.stored import raw
from cognica_mlx.files.whole_file import PARTIAL, leftovers, lock
from cognica_mlx.network.model import PoEModel
from cognica_mlx.training.batches import Text
from cognica_mlx.training.store import (
    DESCRIPTION,
    StoredActivations,
    store_bytes,
    write_store,
)
from mlx_poe.loading.machine_costs import cache_folder
from mlx_poe.training.data import fingerprint

_UNFINISHED = re.compile(rf"\.([0-9a-f]{{20}})\.[0-9a-f]{{8}}{re.escape(PARTIAL)}")
HEADERS = 4096  # more than the arrays' headers and the description take


def base_fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of a base's weights and shape, independent of the files they are stored in. Reads one
    tensor at a time."""
    found = hashlib.blake2b(digest_size=16)
    found.update(json.dumps(checkpoint.config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(checkpoint.weights.items()):
        array = tensor.read()
        found.update(f"{name} {array.shape} {array.dtype}".encode())
        found.update(raw(array))
        del array
        mx.clear_cache()
    return found.hexdigest()


@dataclass(frozen=True)
class Store:
    """The store of a set of texts: where it is or will be, and its size."""

    folder: Path
    texts: Sequence[Text]
    width: int
    bits: int
    dtype: mx.Dtype

    @property
    def exists(self) -> bool:
        """Whether it is already on disk."""
        return (self.folder / DESCRIPTION).is_file()

    @property
    def nbytes(self) -> int:
        """Its size on disk in bytes."""
        return store_bytes(self.texts, self.width, self.bits) + HEADERS

    def wait(self, note: Callable[[str], None]) -> None:
        """Wait for other processes that are making it."""
        for partial in leftovers(self.folder):
            try:
                with lock(partial, wait=False):
                    continue
            except OSError:
                note("another run is reading the same texts: waiting for its activations")
            with lock(partial, wait=True):
                pass

    def make(self, model: PoEModel, progress: Callable[[int], None]) -> None:
        """Run the base below the last stage of `model` over the texts, and keep the result.

        Another process may make it at the same time: whichever ends first has made it. Raises
        CheckpointError if it cannot be written.
        """
        if self.folder.exists() and not self.exists:
            raise CheckpointError(f"{self.folder} lacks {DESCRIPTION}: delete it, to have it made")
        try:
            with new_folder(self.folder, self.nbytes, overwrite=False, private=True) as folder:
                write_store(folder, model, self.texts, self.bits, progress)
        except PoEError:
            if not self.exists:
                raise

    def open(self) -> StoredActivations:
        """Its activations. CheckpointError if it is damaged."""
        return StoredActivations(self.folder, self.texts, self.width, self.bits, self.dtype)


def store_for(
    texts: Sequence[Text],
    *,
    base: str,
    windows: Sequence[int],
    embeddings: dict[int, int],
    width: int,
    bits: int,
    dtype: mx.Dtype,
    parent: Path | None,
) -> Store:
    """The store of `texts` over the base with the fingerprint `base`.

    `windows` are those of the base's layers, which a stage on top may change; `embeddings` maps
    tokens to the tokens whose embeddings they use. The store is in `parent`, by default in the
    user's cache folder. Raises CheckpointError for a user without a home folder.
    """
    if parent is None:
        cache = cache_folder()
        if cache is None:
            raise CheckpointError(
                "there is no home folder to keep activations in: give --store-path"
            )
        parent = cache / "activations"
    key = {
        "base": base,
        "windows": list(windows),
        "embeddings": sorted(embeddings.items()),
        "bits": bits,
        "dtype": str(dtype),
        "texts": fingerprint(texts, counted=False),
    }
    name = hashlib.blake2b(json.dumps(key).encode(), digest_size=10).hexdigest()
    return Store(parent / name, texts, width, bits, dtype)


def remove_unfinished(parent: Path) -> None:
    """Remove what killed runs left in a folder of stores, whatever their texts were."""
    for partial in parent.glob(f".*{PARTIAL}"):
        if name := _UNFINISHED.fullmatch(partial.name):
            remove_leftovers(parent / name[1])


def check_stores(stores: Sequence[Store]) -> int:
    """The bytes that the missing stores will take.

    Raises CheckpointError if the disk lacks the room.
    """
    missing = [store for store in stores if not store.exists]
    needed = sum(store.nbytes for store in missing)
    if missing:
        remedy = (
            "make room, keep the base's activations elsewhere (--store-path), in 8 bits "
            "(--store-bits 8), or run the base in every step (--no-store)"
        )
        check_room(missing[0].folder, needed, remedy)
    return needed
