"""Where activation stores are, and which one belongs to which texts and base.

A store's name is a hash of everything that its content depends on, so an existing store is always
the right one. It appears whole or not at all, and only the user can read it: texts can be recovered
from activations.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from cognica_mlx.convert.checkpoint import Checkpoint
from cognica_mlx.convert.formats.whole_folder import check_room, new_folder, remove_leftovers
from cognica_mlx.errors import CheckpointError, PoEError
from cognica_mlx.files.byte_sizes import size_text
from cognica_mlx.files.stored import raw
from cognica_mlx.files.whole_file import PARTIAL, leftovers, lock
from cognica_mlx.network.model import PoEModel
from cognica_mlx.training.batches import Text
from cognica_mlx.training.store import DESCRIPTION, StoredActivations, store_bytes, write_store
from mlx_poe.loading.machine_costs import cache_folder
from mlx_poe.training.data import fingerprint
from mlx_poe.training.reporter import Reporter

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


def stored_activations(
    sets: Sequence[Sequence[Text]],
    model: PoEModel,
    dtype: mx.Dtype,
    about: Mapping[str, Any],
    parent: Path | None,
    reporter: Reporter,
) -> list[StoredActivations]:
    """The activations below the last stage of `model` for each set of texts.

    Stores that are missing are made first; another process may make them at the same time.
    `about` names, JSON-ready, what they depend on besides the texts, among it the `bits` per value.
    They are in `parent`, by default in the user's cache folder. Raises CheckpointError for a user
    without a home folder, a store that is damaged, or a disk that lacks the room.
    """
    if parent is None:
        cache = cache_folder()
        if cache is None:
            raise CheckpointError(
                "there is no home folder to keep activations in: give --store-path"
            )
        parent = cache / "activations"
    width, bits, folders = model.config.n_embd, about["bits"], []
    for texts in sets:
        key = {**about, "dtype": str(dtype), "texts": fingerprint(texts, counted=False)}
        name = hashlib.blake2b(json.dumps(key).encode(), digest_size=10).hexdigest()
        folders.append(parent / name)
    remove_unfinished(parent)
    for folder in folders:
        _wait(folder, reporter.note)
    missing = {f: t for f, t in zip(folders, sets, strict=True) if not _exists(f)}
    sizes = {f: store_bytes(texts, width, bits) + HEADERS for f, texts in missing.items()}
    if missing:
        needed = sum(sizes.values())
        remedy = (
            "make room, keep the base's activations elsewhere (--store-path), in 8 bits "
            "(--store-bits 8), or run the base in every step (--no-store)"
        )
        check_room(folders[0], needed, remedy)
        reporter.note(f"the base's activations take {size_text(needed)} in {parent}")
    else:
        reporter.note(f"the base's activations are already in {parent}")
    positions, done = sum(len(text) for texts in missing.values() for text in texts), 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        reporter.progress("reading", done, positions)

    for folder, texts in missing.items():
        if folder.exists() and not _exists(folder):
            raise CheckpointError(f"{folder} lacks {DESCRIPTION}: delete it, to have it made")
        try:
            with new_folder(folder, sizes[folder], overwrite=False, private=True) as new:
                write_store(new, model, texts, bits, more)
        except PoEError:
            if not _exists(folder):
                raise
    return [
        StoredActivations(folder, texts, width, bits, dtype)
        for folder, texts in zip(folders, sets, strict=True)
    ]


def _exists(folder: Path) -> bool:
    return (folder / DESCRIPTION).is_file()


def _wait(folder: Path, note: Callable[[str], None]) -> None:
    """Wait for other processes that are making a store."""
    for partial in leftovers(folder):
        try:
            with lock(partial, wait=False):
                continue
        except OSError:
            note("another run is reading the same texts: waiting for its activations")
        with lock(partial, wait=True):
            pass


def remove_unfinished(parent: Path) -> None:
    """Remove what killed runs left in a folder of stores, whatever their texts were."""
    for partial in parent.glob(f".*{PARTIAL}"):
        if name := _UNFINISHED.fullmatch(partial.name):
            remove_leftovers(parent / name[1])
