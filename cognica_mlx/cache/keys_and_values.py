"""What the rest of the engine needs of a cache: everything that stores keys and values is behind
these protocols.

- a layer attends through an `AttentionCache`, which serves one pass of one or many sequences
- a state has a `KeysAndValues` for each stage, which can roll back and fork; a pass gives each
  sequence a `Done` to commit
"""

from __future__ import annotations

from typing import Any, Protocol

import mlx.core as mx


class AttentionCache(Protocol):
    """What a layer needs from a cache, ours or another library's, for the positions of one pass."""

    @property
    def offset(self) -> int | mx.array:
        """The first position, or an array if positions differ: (B,), or (T,) for packed rows."""

    def attend(self, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        """Add keys and values (B, KV, T, head_dim); attention of queries (B, H, T, head_dim)."""


class Done(Protocol):
    """One sequence's part of a pass."""

    def result(self) -> Any:
        """What its cache holds after the pass, in the cache's own form."""


class KeysAndValues(Protocol):
    """One sequence's keys and values in one stage, for its latest positions."""

    @property
    def offset(self) -> int:
        """The position of the next key."""

    @property
    def earliest(self) -> int:
        """The earliest position that `rollback` can return to, here or in a fork."""

    def commit(self, done: Done) -> None:
        """Replace the content with a pass's result, by one assignment."""

    def rollback(self, position: int) -> None:
        """Drop the keys from `position` on. Raises RollbackError before `earliest`."""

    def fork(self) -> KeysAndValues:
        """An independent copy; arrays are shared until either side writes."""

    def aside(self) -> KeysAndValues:
        """A fork to be dropped before this cache is used again: neither side copies large arrays
        because of the other."""

    def next_round(self) -> None:
        """Note that all work that reads the arrays is done: they may be written again."""

    def trim(self) -> None:
        """Move the rows to arrays of just their size, for a cache that pauses. Waits for them."""

    def arrays(self) -> list[mx.array]:
        """The arrays that it holds, to evaluate or count bytes."""
