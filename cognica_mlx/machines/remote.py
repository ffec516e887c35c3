"""A stage on another machine, as rank 0's state and driver see it.

- `RemoteStage` is used like any other stage; a pass for many sequences is one message to its owner
- `RemoteCache` tracks how many positions a sequence has there and how far it can be rolled back.
  The owner rolls its cache back to the start of the next pass, so a rollback needs no message
- `Elsewhere` is the output of a pass. It stays with the owner until the arrays are needed: the next
  stage on the same rank uses it in place, a stage on a third rank gets it directly, and most of a
  prompt's activations never reach rank 0
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import mlx.core as mx

from cognica_mlx.cache.hidden import Hidden, beginnings
from cognica_mlx.cache.keys_and_values import AttentionCache, Done, KeysAndValues
from cognica_mlx.errors import RankLostError, RequestError, RollbackError
from cognica_mlx.machines.link import Link
from cognica_mlx.machines.messages import DROP, FORGET, FORK, Kind, hidden_parts, read_hidden
from cognica_mlx.network.stages import Stage

if TYPE_CHECKING:
    from cognica_mlx.network.model import PoEModel

# Where the positions of a pass come from: the message, the owner itself, another rank.
BODY, OWN, FROM = range(3)


class _Pass(NamedTuple):
    """Caches that share a pass of `counts` positions, whose rows begin at `starts`."""

    caches: Sequence[RemoteCache]
    counts: Sequence[int]
    starts: Sequence[int]


class RemoteStage(Stage):
    """A stage on rank `rank`, known there by `number`.

    If it `speaks`, its owner also holds its heads and makes its predictions.
    """

    def __init__(
        self,
        model: PoEModel,
        layers: range,
        source: int,
        *,
        link: Link,
        rank: int,
        number: int,
        speaks: bool = False,
    ):
        super().__init__(model, layers, source)
        self.link, self.rank, self.number, self.speaks = link, rank, number, speaks

    @property
    def dispensable(self) -> bool:  # type: ignore[override]
        return self.link.degrade

    def new_cache(self, slack: int) -> KeysAndValues:
        return RemoteCache(self, slack)

    def order(self, caches: Sequence[RemoteCache], counts: Sequence[int]) -> list[int]:
        """See `Stage`; the owner has an order of its own."""
        return list(range(len(caches)))

    def __call__(self, hidden: Hidden, caches: Sequence[AttentionCache] | None = None) -> NoReturn:
        """Raises RequestError: a remote stage runs only passes of sequences."""
        raise RequestError(
            f"stage {self.number} is on rank {self.rank}, which runs it for sequences only; "
            "this needs the whole model on one machine"
        )

    def plan(self, caches: Sequence[RemoteCache], counts: Sequence[int]) -> _Pass:
        """See `Stage`."""
        return _Pass(caches, counts, beginnings(counts))

    def run(self, hidden: Hidden, plan: _Pass) -> tuple[Hidden, Sequence[Done]]:
        """See `Stage`. Does not wait for the pass; one that fails is undone later."""
        handle = Handle(self, len(hidden))
        numbers = [self.number, handle.number, len(plan.caches)]
        for cache, rows in zip(plan.caches, plan.counts, strict=True):
            numbers += [cache.number, cache.offset, rows, cache.slack]
        starts = [(cache, cache.offset) for cache in plan.caches]
        self._post(hidden, numbers, partial(_return_to, starts))
        done = [_Reached(start + n) for (_, start), n in zip(starts, plan.counts, strict=True)]
        return Elsewhere([Piece(handle, 0, len(hidden))]), done

    def _post(self, hidden: Hidden, numbers: list[int], undo: Callable[[], None]) -> None:
        link = self.link
        if isinstance(hidden, Elsewhere) and hidden.rank == self.rank:
            link.post(self.rank, Kind.RUN, [*numbers, OWN, *hidden.named()], undo=undo)
        elif isinstance(hidden, Elsewhere) and not hidden.arrays() and hidden.goes_to(self.rank):
            # The receiver is told first: the activations may come by the same way as the message.
            forward = hidden.rank, Kind.PASS, [self.rank, *hidden.named()]
            link.post(self.rank, Kind.RUN, [*numbers, FROM, hidden.rank], undo=undo, then=forward)
        else:
            about, arrays = hidden_parts(hidden)
            link.post(self.rank, Kind.RUN, [*numbers, BODY, *about], arrays, undo)

    def ask_logits(self, hidden: Hidden, drafts: bool = False) -> Callable[[], mx.array] | None:
        if not self.speaks:
            return None
        numbers = [self.number, int(drafts)]
        if isinstance(hidden, Elsewhere) and hidden.rank == self.rank:
            answer = self.link.ask(self.rank, Kind.SCORE, [*numbers, OWN, *hidden.named()])
        else:
            about, arrays = hidden_parts(hidden)
            answer = self.link.ask(self.rank, Kind.SCORE, [*numbers, BODY, *about], arrays)
        shape = 1, len(hidden), self._model.config.vocab_size
        return lambda: answer().arrays((shape, mx.float32))[0]

    @property
    def dtype(self) -> mx.Dtype:
        return self._model.resid_lambdas.dtype


def lost_link(models: Iterable[PoEModel]) -> Link | None:
    """The connection with the machines that hold stages of these models, if one of them is lost."""
    for model in models:
        for stage in model.stages:
            if isinstance(stage, RemoteStage) and stage.link.lost:
                return stage.link
    return None


class Handle:
    """Activations of `count` positions that a stage's owner holds, for as long as this lives."""

    def __init__(self, stage: RemoteStage, count: int):
        self.stage, self.count = stage, count
        self.number = stage.link.number()

    def __del__(self) -> None:
        self.stage.link.tell(self.stage.rank, FORGET, self.number, 0)


@dataclass(frozen=True)
class Piece:
    """Positions start .. stop - 1 of a handle's activations."""

    handle: Handle
    start: int
    stop: int


def _fetched(name: str) -> Any:
    return property(lambda self: getattr(self._fetch(), name))


class Elsewhere(Hidden):
    """Positions at a stage boundary; the arrays are fetched from the stage's owner on first use."""

    def __init__(self, pieces: Sequence[Piece]):
        object.__setattr__(self, "pieces", tuple(pieces))
        object.__setattr__(self, "_arrays", None)

    pieces: tuple[Piece, ...]
    _arrays: Hidden | None

    @property
    def stage(self) -> RemoteStage:
        """The stage that they are the output of."""
        return self.pieces[0].handle.stage

    @property
    def rank(self) -> int:
        """The rank that holds them."""
        return self.stage.rank

    def goes_to(self, rank: int) -> bool:
        """Whether their rank can send them to `rank` directly. Stages are in order of ranks, so
        ranks send only to higher ones and never wait for each other in a circle."""
        return self.stage.link.wire.are_next(self.rank, rank)

    def named(self) -> list[int]:
        """How a message refers to them."""
        numbers = [len(self.pieces)]
        for piece in self.pieces:
            numbers += [piece.handle.number, piece.start, piece.stop]
        return numbers

    def _fetch(self) -> Hidden:
        if self._arrays is None:
            answer = self.stage.link.ask(self.rank, Kind.FETCH, self.named())()
            object.__setattr__(self, "_arrays", read_hidden(answer, self.stage.dtype))
        assert self._arrays is not None
        return self._arrays

    tokens, x, x0, backout = map(_fetched, ("tokens", "x", "x0", "backout"))

    def __len__(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)

    def __getitem__(self, positions: slice) -> Elsewhere:
        first, last, _ = positions.indices(len(self))
        found, at = [], 0
        for handle, start, stop in ((p.handle, p.start, p.stop) for p in self.pieces):
            low, high = max(first - at, 0), min(last - at, stop - start)
            if low < high:
                found.append(Piece(handle, start + low, start + high))
            at += stop - start
        return Elsewhere(found)

    def joined(self, parts: Sequence[Hidden]) -> Hidden:
        """See `Hidden`: all are of the same stage."""
        return Elsewhere([p for part in parts if isinstance(part, Elsewhere) for p in part.pieces])

    def copy(self, start: int, stop: int) -> Elsewhere:
        """See `Hidden`; the owner makes the copy."""
        part = self[start:stop]
        handle = Handle(self.stage, stop - start)
        try:
            self.stage.link.post(self.rank, Kind.COPY, [handle.number, *part.named()])
        except RankLostError:
            return part  # there is nothing left to copy; whoever needs it gets the error
        return Elsewhere([Piece(handle, 0, stop - start)])

    def arrays(self) -> list[mx.array]:
        """The fetched arrays, if any."""
        return self._arrays.arrays() if self._arrays else []


class RemoteCache(KeysAndValues):
    """How many positions of a sequence a remote stage has run. Its owner holds at least the rows
    that a cache of the stage's windows and of `slack` holds, so a rollback that is possible here is
    possible there."""

    offset = 0
    # The furthest position ever reached.
    _furthest = 0

    def __init__(self, stage: RemoteStage, slack: int):
        self._stage, self.slack, self.number = stage, slack, stage.link.number()

    def __del__(self) -> None:
        self._stage.link.tell(self._stage.rank, DROP, self.number, 0)

    @property
    def earliest(self) -> int:
        """See `KeysAndValues`: the first windows to lose rows are the shortest."""
        full = min(self._stage.windows) + self.slack
        return self._furthest - self.slack if self._furthest > full else 0

    def commit(self, done: Done) -> None:
        reached = done.result()
        self._furthest = max(self._furthest, reached)
        self.offset = reached

    def rollback(self, position: int) -> None:
        if not self.earliest <= position <= self.offset:
            raise RollbackError(
                f"cannot return to position {position}: "
                f"the cache holds positions {self.earliest} to {self.offset}"
            )
        self.offset = position

    def fork(self) -> RemoteCache:
        other = RemoteCache(self._stage, self.slack)
        other.offset, other._furthest = self.offset, self._furthest
        self._stage.link.tell(self._stage.rank, FORK, other.number, self.number)
        return other

    aside = fork

    def next_round(self) -> None:
        return

    trim = next_round

    def arrays(self) -> list[mx.array]:
        return []


class _Reached(int):
    """The position after a pass that a cache's owner has been asked for: a `Done`."""

    def result(self) -> int:
        return self


def _return_to(starts: Sequence[tuple[RemoteCache, int]]) -> None:
    """Go back to where a failed pass started."""
    for cache, start in starts:
        cache.offset = min(cache.offset, start)
