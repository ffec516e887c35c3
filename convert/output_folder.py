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
    *("config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json"),
    *("*.safetensors", "*.safetensors.index.json", "poe_calibration.json", "cognica_poe.py"),
    *("chat_template.jinja", "tokenizer.pkl", "token_bytes.pt"),
    *("README.md", "LICENSE", ".gitattributes"),
)


def check_target(target: Path, overwrite: bool, sources: Sequence[Path] = ()) -> None:
    """Raise RequestError unless `target` is free, or is a model folder that may be replaced.

    A folder in `sources`, which the new one is made from, never is.
    """
    if target.resolve() == Path.cwd():
        raise RequestError(f"{target} is the current folder: name one to be made")
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
def new_folder(target: Path, nbytes: int, overwrite: bool) -> Iterator[Path]:
    """A folder to fill with about `nbytes`: it becomes `target` if the block ends well.

    If not, by an interruption too, it vanishes, and what was at `target` stays. Raises
    CheckpointError where the disk has no room for it or will not take it, RequestError where
    something else has appeared at `target` in the meantime.
    """
    target = target.resolve()
    parent = next(folder for folder in target.parents if folder.exists())
    mark = secrets.token_hex(4)
    partial, old = (parent / f".{mark}.{kind}" for kind in ("partial", "old"))
    try:
        free = shutil.disk_usage(parent).free
        if nbytes > free:
            raise CheckpointError(
                f"{parent} has {free / 1e9:.2f} GB free, and {nbytes / 1e9:.2f} GB are needed: "
                "make room, or choose another place"
            )
        partial.mkdir()
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        check_target(target, overwrite)
        if target.exists():
            target.rename(old)
        try:
            partial.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{target} cannot be written: {reason}; nothing was kept") from None
    finally:
        if old.exists() and not target.exists():
            old.rename(target)  # interrupted between the two
        shutil.rmtree(partial, ignore_errors=True)
