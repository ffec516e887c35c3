"""Activations passed from stage to stage: arrays of consecutive positions, and views of them.

- `Hidden` holds the arrays; `Rows` names a part of one without slicing it
- a pass that packs several sequences gives each its `Rows` of the result; `pack` joins them again
  for the next pass, without touching an array if sequences and order are the same
- `Boundary` keeps one stage's output for one sequence, as far back as it is needed
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx

# A view is copied if the pass that it keeps in memory has SPARSE times its rows or more, and at
# least MANY: more than sequences decode at once, so a prompt was in the same pass.
SPARSE, MANY = 8, 64
# `Boundary.compact` makes runs of up to this many positions, and leaves whole runs of a quarter.
RUN = 64


@dataclass(frozen=True)
class Hidden:
    """Positions at a stage boundary, with everything that the next stage needs.

    tokens (B, T) int; x and x0 (B, T, D), the residual stream and the smeared embedding;
    backout (B, T, D), or None at boundaries before the backout layer.
    """

    tokens: mx.array
    x: mx.array
    x0: mx.array
    backout: mx.array | None = None

    def __len__(self) -> int:
        return self.tokens.shape[1]

    def __getitem__(self, positions: slice) -> Hidden:
        return self._each(lambda array: array[:, positions])

    def take(self, rows: mx.array) -> Hidden:
        """The positions at the indices `rows`."""
        return self._each(lambda array: mx.take(array, rows, axis=1))

    def copy(self, start: int, stop: int) -> Hidden:
        """Positions start .. stop - 1 in arrays of their own."""
        return self._each(lambda array: mx.contiguous(array[:, start:stop]))

    def _each(self, part) -> Hidden:  # type: ignore[no-untyped-def]
        # In an embedded text x0 is x: keep them one array.
        x = part(self.x)
        x0 = x if self.x0 is self.x else part(self.x0)
        backout = None if self.backout is None else part(self.backout)
        return Hidden(part(self.tokens), x, x0, backout)

    @staticmethod
    def concatenate(parts: Sequence[Hidden]) -> Hidden:
        """Join positions along T."""
        return parts[0] if len(parts) == 1 else parts[0].joined(parts)

    def joined(self, parts: Sequence[Hidden]) -> Hidden:
        """The positions of all `parts`, starting with this one, joined along T."""

        def joined(arrays: list[mx.array]) -> mx.array:
            return mx.concatenate(arrays, axis=1)

        x = joined([part.x for part in parts])
        embedded = all(part.x0 is part.x for part in parts)
        backouts = [part.backout for part in parts if part.backout is not None]
        return Hidden(
            joined([part.tokens for part in parts]),
            x,
            x if embedded else joined([part.x0 for part in parts]),
            joined(backouts) if backouts else None,
        )

    def arrays(self) -> list[mx.array]:
        """The distinct arrays, to evaluate or count bytes."""
        found = [self.tokens, self.x, self.backout]
        if self.x0 is not self.x:
            found.append(self.x0)
        return [array for array in found if array is not None]


class Rows:
    """Positions start .. stop - 1 of a `Hidden` with B = 1, not yet sliced."""

    __slots__ = ("source", "start", "stop")

    def __init__(self, source: Hidden, start: int, stop: int):
        self.source, self.start, self.stop = source, start, stop

    @staticmethod
    def of(hidden: Hidden) -> Rows:
        """A view of all positions."""
        return Rows(hidden, 0, len(hidden))

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> Rows:
        """Positions start .. stop - 1, counted from this view's own start."""
        return Rows(self.source, self.start + start, self.start + stop)

    def hidden(self) -> Hidden:
        """The positions as arrays."""
        if len(self) == len(self.source):
            return self.source
        return self.source[self.start : self.stop]

    def compact(self) -> Rows:
        """The same positions, copied if the view keeps much more than itself in memory."""
        total = len(self.source)
        if total < MANY or total < SPARSE * len(self):
            return self
        return Rows.of(self.source.copy(self.start, self.stop))


def pack(pieces: Sequence[Rows]) -> Hidden:
    """The positions of all pieces joined, (1, total, D)."""
    parts: list[Hidden] = []
    source, start, stop = pieces[0].source, pieces[0].start, pieces[0].start
    for piece in pieces:
        if piece.source is not source or piece.start != stop:
            parts.append(Rows(source, start, stop).hidden())
            source, start = piece.source, piece.start
        stop = piece.stop
    parts.append(Rows(source, start, stop).hidden())
    return Hidden.concatenate(parts)


def beginnings(counts: Sequence[int]) -> list[int]:
    """Where parts of `counts` positions begin that follow one another."""
    return [0, *accumulate(counts)][: len(counts)]


class Boundary:
    """Activations of one sequence at one stage boundary, in runs of consecutive positions."""

    def __init__(self) -> None:
        self._runs: deque[tuple[int, Rows]] = deque()
        self.stop = 0
        # Foreign positions kept in memory by views since `compact`: other sequences' and rejected.
        self.excess = 0

    @property
    def start(self) -> int:
        """The first position held, or `stop` if none is."""
        return self._runs[0][0] if self._runs else self.stop

    def append(self, rows: Rows) -> None:
        """Add the positions that follow the last."""
        count = len(rows)
        self._runs.append((self.stop, rows))
        self.stop += count
        self.excess += len(rows.source) - count

    def read(self, start: int, stop: int) -> list[Rows]:
        """Positions start .. stop - 1, which must be held, in pieces."""
        parts: list[Rows] = []
        # From the end: requests are for recent positions, and there may be many old runs.
        for first, rows in reversed(self._runs):
            count = len(rows)
            if start <= first and first + count <= stop:
                parts.append(rows)
            elif first < stop and start < first + count:
                parts.append(rows.part(max(start - first, 0), min(stop - first, count)))
            if first <= start:
                break
        return parts[::-1]

    def forget_before(self, position: int) -> None:
        """Drop the runs that lie wholly before `position`."""
        while self._runs and self._runs[0][0] + len(self._runs[0][1]) <= position:
            self._runs.popleft()

    def truncate(self, position: int) -> None:
        """Drop the positions from `position` on."""
        if position >= self.stop:
            return
        while self._runs and self._runs[-1][0] >= position:
            self._runs.pop()
        if self._runs:
            first, rows = self._runs[-1]
            if first + len(rows) > position:
                self._runs[-1] = (first, rows.part(0, position - first))
                self.excess += first + len(rows) - position
        self.stop = position

    def compact(self) -> list[mx.array]:
        """Copy short runs, and views of passes shared with other sequences, to arrays of their own.

        Returns the new arrays, unevaluated; the old ones stay in memory until they are computed.
        """
        made: list[mx.array] = []
        runs: deque[tuple[int, Rows]] = deque()
        loose: list[tuple[int, Rows]] = []

        def finish() -> None:
            if loose:
                hidden = pack([rows for _, rows in loose])
                hidden = hidden.copy(0, len(hidden))  # where it is still a view
                runs.append((loose[0][0], Rows.of(hidden)))
                made.extend(hidden.arrays())
                loose.clear()

        for first, rows in self._runs:
            if len(rows) == len(rows.source) and len(rows) >= RUN // 4:
                finish()
                runs.append((first, rows))
                continue
            if loose and first + len(rows) - loose[0][0] > RUN:
                finish()
            loose.append((first, rows))
        finish()
        self._runs, self.excess = runs, 0
        return made

    def fork(self) -> Boundary:
        """An independent copy that shares the arrays."""
        other = Boundary()
        other._runs, other.stop, other.excess = self._runs.copy(), self.stop, self.excess
        return other

    def sources(self) -> list[Hidden]:
        """The `Hidden` objects that its runs are views of, each once."""
        return list({id(rows.source): rows.source for _, rows in self._runs}.values())
