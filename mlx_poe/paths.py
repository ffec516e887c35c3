"""Paths as users write them."""

from __future__ import annotations

from pathlib import Path

from cognica_mlx.errors import RequestError


def user_path(path: str | Path) -> Path:
    """`path` with `~` expanded. RequestError if no file can have this name."""
    if "\0" in str(path):
        raise RequestError(f"{str(path)!a} contains a null character, which paths cannot")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise RequestError(f"{path}: there is no such home folder") from None
