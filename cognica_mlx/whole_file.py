"""Writing a file whole or not at all.

- in: the path where the file should end up
- out: a temporary path to write to, moved into place only if nothing fails
- it knows nothing about the file's contents
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """A temporary path ending in `suffix`; its file becomes `path` if the block succeeds.

    Symbolic links are followed, so a link keeps pointing where it did. A device, a pipe or
    anything else that is not a regular file is written to, never replaced. An existing file keeps
    its permissions; a new one gets those that the umask allows. If the block raises, the temporary
    file is removed and `path` is unchanged. Raises OSError if the file cannot be written.
    """
    exists = path.exists()
    in_place = exists and not path.is_file()
    target = path if in_place else Path(os.path.realpath(path))
    folder = None if in_place else target.parent
    handle, name = tempfile.mkstemp(suffix, f".{target.name}.", folder)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if in_place:
            with temporary.open("rb") as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        else:
            temporary.chmod(target.stat().st_mode & 0o7777 if exists else 0o666 & ~_umask())
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _umask() -> int:
    # The umask cannot be read without setting it.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
