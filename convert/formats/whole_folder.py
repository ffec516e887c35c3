"""Writes a folder whole or not at all.

It is filled under a hidden name beside the target and renamed at the end. The process that fills it
holds a lock on it, so that a later run can recognize and remove what a dead process left behind.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from cognica_mlx.errors import CheckpointError, RequestError
from cognica_mlx.files.byte_sizes import size_text
from cognica_mlx.files.whole_file import PARTIAL, leftovers, lock, locked_new, private_folder

_OLD = ".old"
# What a replaceable model folder may contain: only files that are not a user's only copy.
_REPLACEABLE = (
    *("config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json"),
    *("*.safetensors", "*.safetensors.index.json", "poe_calibration.json", "cognica_poe.py"),
    *("chat_template.jinja", "tokenizer.pkl", "token_bytes.pt"),
    *("README.md", "LICENSE", ".gitattributes"),
)


def check_target(target: Path, overwrite: bool, sources: Sequence[Path] = ()) -> None:
    """Raise RequestError unless `target` is free, or is a model folder that may be replaced.

    The folders in `sources`, which the new one is made from, may not be replaced.
    """
    if _same(target, Path.cwd()):
        raise RequestError(f"{target} is the current folder: name a new one")
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise RequestError(f"{target} exists and is not a folder")
    names = sorted(entry.name for entry in target.iterdir())
    if not names:
        return
    for source in sources:
        if _same(target, source):
            raise RequestError(f"{target} is what is being converted: choose another folder")
        if any(_same(target, parent) for parent in _resolved(source).parents):
            raise RequestError(f"{target} holds {source}, which is being converted")
    if not overwrite:
        raise RequestError(f"{target} exists: choose another folder, or replace it (--overwrite)")
    if "config.json" not in names:
        raise RequestError(f"{target} is not a model folder: not overwritten")
    for name in names:
        known = any(fnmatch(name, pattern) for pattern in _REPLACEABLE)
        if not known or not (target / name).is_file():
            raise RequestError(f"{target} holds {name}, which is not a model file: not overwritten")


@contextmanager
def new_folder(
    target: Path, nbytes: int, overwrite: bool, *, private: bool = False
) -> Iterator[Path]:
    """A folder to fill with about `nbytes`, which becomes `target` if the block succeeds.

    If the block fails, the folder is removed and `target` stays as it was; after a kill, the next
    call for `target` does that. Only the user can open a `private` one, and the folders that are
    made for it. Raises CheckpointError if the disk is full or cannot be written, RequestError if
    something else has appeared at `target` in the meantime.
    """
    target = _resolved(target)
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        remove_leftovers(target)
        check_room(target, nbytes, "make room, or choose another place")
        if private:
            private_folder(target.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = 0o700 if private else 0o777
        with locked_new(target, lambda new: new.mkdir(mode)) as partial:
            old = partial.with_suffix(_OLD)
            try:
                yield partial
                check_target(target, overwrite)
                if target.exists():
                    target.rename(old)
                partial.rename(target)
                shutil.rmtree(old, ignore_errors=True)
            finally:
                if old.exists() and not target.exists():
                    old.rename(target)
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{target} cannot be written: {reason}; nothing was kept") from None
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()  # only if it is still empty


def check_room(target: Path, nbytes: int, remedy: str) -> None:
    """Raise CheckpointError, with the remedy, unless `target` may take so many more bytes."""
    existing = next(folder for folder in target.parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if nbytes > free:
        raise CheckpointError(
            f"{existing} has {size_text(free)} free, but {size_text(nbytes)} are needed: {remedy}"
        )


def remove_leftovers(target: Path) -> None:
    """Remove what killed runs left beside `target`, and restore what they had moved away.

    Folders of a run that may still be alive are left alone.
    """
    target = _resolved(target)
    # An old folder may be all that is left, if its run was killed between the renames.
    moved = {old.with_suffix(PARTIAL) for old in leftovers(target, ending=_OLD)}
    for partial in moved.union(leftovers(target)):
        old = partial.with_suffix(_OLD)
        with suppress(OSError), lock(partial, wait=False):
            if old.exists() and not target.exists():
                old.rename(target)
            shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(partial, ignore_errors=True)


def _resolved(path: Path) -> Path:
    # Path.resolve raises RuntimeError for circular links.
    return Path(os.path.realpath(path))


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are the same folder, even if spelled differently (as a disk may allow)."""
    try:
        return one.samefile(other)
    except OSError:
        return _resolved(one) == _resolved(other)
