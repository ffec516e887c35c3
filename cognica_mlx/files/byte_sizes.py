"""Sizes in bytes as people write and read them: "8GB", "512 MB", "1.5GiB", 4096."""

from __future__ import annotations

import re

from cognica_mlx.errors import RequestError

_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,9})?) ?(?:([kmgt])(i?))?b?", re.IGNORECASE)
# More than any machine has, and fewer than an int64 holds.
MOST = 10**18


def byte_size(text: str | int) -> int:
    """A size in bytes: k, M, G and T are powers of 1000, Ki, Mi, Gi and Ti of 1024.

    Raises RequestError for anything else.
    """
    match = _SIZE.fullmatch(str(text).strip())
    if not match or isinstance(text, bool) or ("." in match[1] and not match[2]):
        raise RequestError(f"{str(text)!r:.60} is not a size, such as 8GB, 512MB or 1.5GiB")
    number, unit, binary = match.groups()
    factor: int = (1024 if binary else 1000) ** (" kmgt".index(unit.lower()) if unit else 0)
    size = round(float(number) * factor) if "." in number else int(number) * factor
    if size > MOST:
        raise RequestError(f"{text} is more than any machine's memory")
    return size


def size_text(count: float) -> str:
    """A number of bytes for people: "8.00 GB", "512.0 MB", "1.5 kB"."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
