"""Writing a file whole or not at all.

- in: the path where the file should end up
- out: a temporary path to write to, moved into place only if nothing fails
- it knows nothing about the file's contents
- a temporary file or folder is locked by the process that fills it, so that a later run can
  recognize and remove what a dead process left behind
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

PARTIAL = ".partial"


@contextmanager
def replacing(path: Path, suffix: str = "", *, private: bool = False) -> Iterator[Path]:
    """A temporary path ending in `suffix`; its file becomes `path` if the block succeeds.

    Symbolic links are followed, so a link keeps pointing where it did. A device, a pipe or
    anything else that is not a regular file is written to, never replaced. An existing file keeps
    its permissions, and a new one gets those that the umask allows; only the user can read a
    `private` one, new or not. If the block raises, the temporary file is removed and `path` is
    unchanged; after a kill, the next call for `path` removes it. Raises OSError naming `path` if
    the file cannot be written.
    """
    exists = path.exists()
    in_place = exists and not path.is_file()
    target = path if in_place else Path(os.path.realpath(path))
    beside = Path(tempfile.gettempdir(), target.name) if in_place else target
    temporary, ending = None, f"{PARTIAL}{suffix}"
    try:
        for left in leftovers(beside, ending):
            with suppress(OSError), lock(left, wait=False):
                left.unlink(missing_ok=True)
        with locked_new(
            beside, partial(Path.touch, mode=0o600, exist_ok=False), ending
        ) as temporary:
            try:
                yield temporary
                if in_place:
                    with temporary.open("rb") as source, path.open("wb") as sink:
                        shutil.copyfileobj(source, sink)
                else:
                    if not private:
                        mode = target.stat().st_mode & 0o7777 if exists else 0o666 & ~_umask()
                        temporary.chmod(mode)
                    temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        # A failed write, unlike a failed open, does not say which file it was.
        if error.filename is None or str(error.filename) == str(temporary or error.filename):
            error.filename, error.filename2 = str(path), None
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def leftovers(target: Path, ending: str = PARTIAL) -> list[Path]:
    """The temporary files or folders for `target`. Nobody fills one whose lock is free."""
    if not target.parent.is_dir():
        return []
    start, end = re.escape(f"{_prefix(target)}."), re.escape(ending)
    name = re.compile(f"{start}[0-9a-f]{{8}}{end}")
    return [entry for entry in target.parent.iterdir() if name.fullmatch(entry.name)]


@contextmanager
def locked_new(
    target: Path, make: Callable[[Path], object], ending: str = PARTIAL
) -> Iterator[Path]:
    """A new temporary path beside `target`, made by `make` and locked while the block runs."""
    while True:
        temporary = target.with_name(f"{_prefix(target)}.{secrets.token_hex(4)}{ending}")
        make(temporary)
        with lock(temporary, wait=True):
            # Another run may have cleaned it up before it was locked.
            if temporary.exists():
                yield temporary
                return


@contextmanager
def lock(path: Path, wait: bool) -> Iterator[None]:
    """Hold the lock on a file or folder for the block; it ends with the process at the latest.

    With `wait`, wait for the lock, and go on without it if the file system does not support locks.
    Otherwise raise OSError unless the lock is free. A path that does not exist needs no lock.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield
        return
    try:
        if wait:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _prefix(target: Path) -> str:
    """The beginning of temporary names for `target`; a hash replaces a very long name."""
    name = target.name
    if len(os.fsencode(name)) > 200:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}"


def private_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for the user alone.

    Folders that exist stay as they are. Raises OSError if one cannot be made.
    """
    for each in (*reversed(folder.parents), folder):
        if not each.is_dir():
            each.mkdir(mode=0o700, exist_ok=True)


def _umask() -> int:
    # The umask cannot be read without setting it.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
