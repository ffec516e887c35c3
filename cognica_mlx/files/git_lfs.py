"""Git LFS pointers: the small text files that a clone holds in place of large ones."""

from __future__ import annotations

from pathlib import Path

_START = b"version https://git-lfs.github.com/spec/"


def pointer_problem(path: Path) -> str | None:
    """What to tell a user if the file is a pointer, to follow its name; None for other files."""
    try:
        if not path.is_file():
            return None  # it may be a FIFO, which would wait
        with path.open("rb") as file:
            start = file.read(len(_START))
    except OSError:
        return None  # the reader reports it
    if start != _START:
        return None
    return (
        "is a Git LFS pointer, not the file itself: install git-lfs and run `git lfs pull` in "
        "its folder"
    )
