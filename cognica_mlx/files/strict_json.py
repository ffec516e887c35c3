"""JSON that every reader accepts, with null for NaN and infinity; JSON files.

Files are UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read(path: Path) -> Any:
    """The value in a file. Raises OSError, ValueError or RecursionError if there is none."""
    return json.loads(path.read_text(encoding="utf-8-sig"))


def loads(text: str, levels: int, **options: Any) -> Any:
    """A value that a stranger sent: finite numbers, at most `levels` inside each other. ValueError
    for anything else."""
    try:
        value = json.loads(text, parse_constant=_number, parse_float=_number, **options)
    except RecursionError:
        value = None
    else:
        if _fits(value, levels):
            return value
    raise ValueError(f"nested more than {levels} deep")


def _number(text: str) -> float:
    if math.isfinite(number := float(text)):
        return number
    raise ValueError(f"{text:.20} is not a number in JSON, or too large")


def _fits(value: Any, levels: int) -> bool:
    if not isinstance(value, (dict, list)):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_fits(item, levels - 1) for item in inner)


def dumps(value: Any, **options: Any) -> str:
    """`json.dumps` with null for each float that JSON cannot represent."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except (TypeError, ValueError):  # rare, so that most values are gone through only once
        return json.dumps(_finite(value), allow_nan=False, **options)


def write(path: Path, value: Any, **options: Any) -> None:
    """Write a file, by default with two spaces for each level."""
    path.write_text(dumps(value, **{"indent": 2, **options}) + "\n", encoding="utf-8")


def line(value: Any) -> bytes:
    """A line of JSON in UTF-8, whatever the locale. Lone surrogates, which UTF-8 lacks, stay
    escaped."""
    # Python writes a surrogate's escape just as JSON does.
    return dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
