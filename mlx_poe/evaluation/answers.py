"""A store of answers, so that an interrupted run can resume.

- in: a key for each request and predictor, and its answer as a JSON value
- out: the same answers, in this run and later ones
- an SQLite file, like lm-eval's own; without a path the answers live as long as the run
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from cognica_mlx.errors import RequestError
from cognica_mlx.files.stored import raw
from cognica_mlx.network.model import PoEModel

# Seconds of work that a killed process may lose.
COMMIT = 1.0


class Answers:
    """A store of answers. Once it is closed, all of them are on disk.

    Raises RequestError for a file that is not such a store.
    """

    def __init__(self, path: Path | None = None):
        self._path = path
        try:
            self._file = sqlite3.connect(path or ":memory:")
            self._file.execute("create table if not exists answers (key text primary key, value)")
            self._file.execute("select key, value from answers limit 0")
            self._file.commit()
        except sqlite3.Error as error:
            raise RequestError(
                f"{path} is not a cache of mlx_poe.evaluate ({error}); name a new file"
            ) from None
        self._written = time.monotonic()

    def number(self, key: str) -> tuple[float, bool] | None:
        """A log-probability, and whether the continuation is the best guess; None if there is no
        such answer yet."""
        match self._get(key):
            case [float() | int() as total, bool() as best] if not isinstance(total, bool):
                return total, best
        return None

    def text(self, key: str) -> str | None:
        """A reply; None if there is none yet."""
        found = self._get(key)
        return found if isinstance(found, str) else None

    def _get(self, key: str) -> Any:
        """The answer; None if there is none, or none that can be read: it is made again."""
        with self._named():
            query = "select value from answers where key = ?"
            row = self._file.execute(query, (key,)).fetchone()
        try:
            return json.loads(row[0]) if row else None
        except (TypeError, ValueError, RecursionError):
            return None

    def put(self, key: str, value: Any) -> None:
        """Keep an answer."""
        with self._named():
            statement = "insert or replace into answers values (?, ?)"
            self._file.execute(statement, (key, json.dumps(value)))
            if time.monotonic() - self._written > COMMIT:
                self._file.commit()
                self._written = time.monotonic()

    def close(self) -> None:
        """Write all remaining answers."""
        with self._named():
            self._file.commit()
            self._file.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Raise errors with the file (a full disk, another run) as an OSError."""
        try:
            yield
        except sqlite3.Error as error:
            raise OSError(f"{self._path}: {error}") from None


def key_of(*parts: Any) -> str:
    """A key for JSON values."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def fingerprint(model: PoEModel, base: PoEModel | None = None) -> str:
    """A hash of a model's configuration, weights and device, to keep different models' answers
    apart; without the weights that it shares with `base`."""
    found = hashlib.blake2b(repr((model.config, mx.default_device())).encode(), digest_size=16)
    shared = set(map(id, _arrays(base).values())) if base else set()
    for name, array in _arrays(model).items():
        if id(array) not in shared:
            found.update(f"{name} {array.shape} {array.dtype}".encode())
            found.update(raw(array))
    return found.hexdigest()


def _arrays(model: PoEModel) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))
