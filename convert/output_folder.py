"""A folder that appears whole or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from cognica_mlx.errors import CheckpointError, RequestError

# What a model folder may hold and still be replaced: nothing that a person keeps only there.
_REPLACEABLE = (
    *("*.json", "*.safetensors", "*.py", "*.jinja", "*.pkl", "token_bytes.pt"),
    *("README.md", "LICENSE*", ".gitattributes"),
)


def check_target(target: Path, overwrite: bool, sources: Sequence[Path] = ()) -> None:
    """Raise RequestError unless `target` is free, or is a model folder that may be replaced.

    A folder in `sources`, which the new one is made from, never is.
    """
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise RequestError(f"{target} exists and is no folder")
    names = sorted(entry.name for entry in target.iterdir())
    if not names:
        return
    for source in sources:
        if source.resolve() == target.resolve():
            raise RequestError(f"{target} is what is being converted: choose another folder")
        if target.resolve() in source.resolve().parents:
            raise RequestError(f"{target} holds {source}, which is being converted")
    if not overwrite:
        raise RequestError(f"{target} exists: choose another folder, or replace it (--overwrite)")
    if "config.json" not in names:
        raise RequestError(f"{target} is not a model folder: not overwritten")
    for name in names:
        known = any(fnmatch(name, pattern) for pattern in _REPLACEABLE)
        if not known or not (target / name).is_file():
            raise RequestError(f"{target} holds {name}, which is no model file: not overwritten")


@contextmanager
def new_folder(target: Path, nbytes: int) -> Iterator[Path]:
    """A folder to fill with about `nbytes`: it becomes `target` if the block ends well.

    If not, by an interruption too, it vanishes, and what was at `target` stays. Raises
    CheckpointError where the disk has no room for it.
    """
    target = target.resolve()
    parent = next(folder for folder in target.parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if nbytes > free:
        raise CheckpointError(
            f"{parent} has {free / 1e9:.2f} GB free, and {nbytes / 1e9:.2f} GB are needed"
        )
    mark = secrets.token_hex(4)
    partial, old = (parent / f".{target.name}.{mark}.{kind}" for kind in ("partial", "old"))
    partial.mkdir()
    try:
        yield partial
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            partial.rename(target)
            return
        target.rename(old)
        try:
            partial.rename(target)
        except BaseException:
            old.rename(target)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
