"""A stage on another machine, as rank 0's state and driver see it.

- `RemoteStage` is a stage like any other: a pass for many sequences is one message to its owner
- `RemoteCache` knows how far a sequence has come there, and how far back it can go: the same sums
  as a cache that holds rows. The owner rolls its own back to where the next pass starts, so a
  rollback needs no message
- `Elsewhere` are the activations that the pass gave out. They stay with the owner until somebody
  needs the arrays: the next stage there takes them up where they are, one on a third machine gets
  them without rank 0, and most of a prompt's are never fetched at all
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import mlx.core as mx

from cognica_mlx.attention import AttentionCache
from cognica_mlx.cache import Content, Done, Span, StageCache
from cognica_mlx.errors import RequestError
from cognica_mlx.hidden import Hidden
from cognica_mlx.machines.link import Link
from cognica_mlx.machines.messages import DROP, FORGET, FORK, Kind, hidden_parts, read_hidden
from cognica_mlx.stages import Stage

if TYPE_CHECKING:
    from cognica_mlx.model import PoEModel

# Where the positions of a pass come from: the message, the owner itself, another rank.
BODY, OWN, FROM = range(3)


class RemoteStage(Stage):
    """A stage that rank `rank` owns, which knows it as its `number`-th.

    Where it `speaks`, its owner holds the heads, too, and predicts.
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

    def new_cache(self, slack: int) -> StageCache:
        """See `Stage`."""
        return RemoteCache(self, slack)

    def __call__(self, hidden: Hidden, caches: Sequence[AttentionCache] | None = None) -> NoReturn:
        """Only passes of sequences go there. Raises RequestError."""
        raise RequestError(
            f"stage {self.number} is on rank {self.rank}, which runs it for sequences only; "
            "this needs the whole model on one machine"
        )

    def run(
        self, hidden: Hidden, caches: Sequence[StageCache], counts: Sequence[int]
    ) -> tuple[Hidden, list[Done]]:
        """A pass of the next positions of each of the caches, which are `hidden`'s, one after the
        other: what it gives out, and what the caches hold then. Does not wait for it."""
        handle = Handle(self, len(hidden))
        numbers = [self.number, handle.number, len(caches)]
        for cache, rows in zip(caches, counts, strict=True):
            assert isinstance(cache, RemoteCache)
            numbers += [cache.number, cache.offset, rows, cache.slack]
        starts = [(cache, cache.offset) for cache in caches]
        self._post(hidden, numbers, partial(_return_to, starts))
        done: list[Done] = [_Done(*pair) for pair in zip(caches, counts, strict=True)]
        return Elsewhere([Piece(handle, 0, len(hidden))]), done

    def _post(self, hidden: Hidden, numbers: list[int], undo: Callable[[], None]) -> None:
        link = self.link
        if isinstance(hidden, Elsewhere) and hidden.rank == self.rank:
            link.post(self.rank, Kind.RUN, [*numbers, OWN, *hidden.named()], undo=undo)
        elif isinstance(hidden, Elsewhere) and not hidden.fetched and hidden.goes_to(self.rank):
            # First who takes, then who gives: on the way by which it is told, what it is given may
            # follow.
            link.post(self.rank, Kind.RUN, [*numbers, FROM, hidden.rank], undo=undo)
            link.post(hidden.rank, Kind.PASS, [self.rank, *hidden.named()])
        else:
            about, arrays = hidden_parts(hidden)
            link.post(self.rank, Kind.RUN, [*numbers, BODY, *about], arrays, undo)

    def logits(self, hidden: Hidden, *, drafts: bool = False) -> Callable[[], mx.array]:
        """Ask for what its owner predicts from `hidden` (1, T, D); returns what waits for it:
        (1, T, V) float32. With `drafts` the activations are a base stage's, without backout."""
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
        """The type of its activations."""
        return self._model.resid_lambdas.dtype


def stage_left(model: PoEModel) -> int | None:
    """The deepest stage that rank 0 can go on with where other ranks are lost; None where it is not
    to go on."""
    for k, stage in enumerate(model.stages):
        if isinstance(stage, RemoteStage):
            return k - 1 if stage.link.degrade else None
    return None


class Handle:
    """Activations of `count` positions that a stage's owner holds; it lets them go with this."""

    def __init__(self, stage: RemoteStage, count: int):
        self.stage, self.count = stage, count
        self.number = stage.link.number()

    def __del__(self) -> None:
        self.stage.link.tell(self.stage.rank, FORGET, self.number, 0)


@dataclass(frozen=True)
class Piece:
    """Positions start .. stop - 1 of what a handle stands for."""

    handle: Handle
    start: int
    stop: int


class Elsewhere(Hidden):
    """Positions at a stage boundary whose arrays are with the stage's owner, until first used."""

    def __init__(self, pieces: Sequence[Piece]):
        object.__setattr__(self, "pieces", tuple(pieces))
        object.__setattr__(self, "_arrays", None)

    pieces: tuple[Piece, ...]
    _arrays: Hidden | None

    @property
    def stage(self) -> RemoteStage:
        """Whose they are."""
        return self.pieces[0].handle.stage

    @property
    def rank(self) -> int:
        """Where they are."""
        return self.stage.rank

    @property
    def fetched(self) -> bool:
        """Whether the arrays are here, too."""
        return self._arrays is not None

    def goes_to(self, rank: int) -> bool:
        """Whether another rank can get them without this one. Ranks give to those behind them only:
        so none ever waits for another in a circle."""
        hops = self.stage.link.wire
        return self.rank < rank and hops.are_next(self.rank, rank)

    def named(self) -> list[int]:
        """How a message says which they are."""
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

    @property
    def tokens(self) -> mx.array:
        """See `Hidden`."""
        return self._fetch().tokens

    @property
    def x(self) -> mx.array:
        """See `Hidden`."""
        return self._fetch().x

    @property
    def x0(self) -> mx.array:
        """See `Hidden`."""
        return self._fetch().x0

    @property
    def backout(self) -> mx.array | None:
        """See `Hidden`."""
        return self._fetch().backout

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
        """See `Hidden`; the copy is made where they are."""
        part = self[start:stop]
        handle = Handle(self.stage, stop - start)
        self.stage.link.post(self.rank, Kind.COPY, [handle.number, *part.named()])
        return Elsewhere([Piece(handle, 0, stop - start)])

    def arrays(self) -> list[mx.array]:
        """Those that are here."""
        return self._arrays.arrays() if self._arrays else []


class RemoteCache(StageCache):
    """How far a sequence has come in a remote stage. Its owner holds no fewer rows than this says,
    so what can be rolled back here can be there."""

    def __init__(self, stage: RemoteStage, slack: int):
        super().__init__(stage.windows, slack)
        self._stage, self.number = stage, stage.link.number()

    def __del__(self) -> None:
        self._stage.link.tell(self._stage.rank, DROP, self.number, 0)

    def retreat(self, position: int) -> None:
        """Go back to where a pass that has failed began."""
        if self.offset > position:
            self.content = _moved(self.content, position - self.offset, self.slack)

    def fork(self) -> StageCache:
        """See `StageCache`."""
        other = RemoteCache(self._stage, self.slack)
        other.content, other.round = self.content, self.round
        self._stage.link.tell(self._stage.rank, FORK, other.number, self.number)
        return other

    def rows(self) -> NoReturn:
        """Raises RequestError: they are on another machine."""
        raise RequestError(
            f"a sequence with stages on rank {self._stage.rank} cannot be written to a file"
        )

    def restore(self, rows: Sequence[tuple[mx.array, mx.array]], offset: int) -> None:
        """Raises RequestError, unless there is nothing to restore."""
        if offset:
            self.rows()


class _Done:
    """A pass of so many positions that a cache's owner was told to make."""

    def __init__(self, cache: StageCache, count: int):
        self._cache, self._count = cache, count

    def result(self) -> Content:
        """See `Done`."""
        return _moved(self._cache.content, self._count, self._cache.slack)


def _moved(content: Content, count: int, slack: int) -> Content:
    """A content with so many more positions, or fewer. It holds what a `StageCache` holds at the
    least, as an owner may have put its rows on a shelf."""
    spans = {
        window: Span(max(min(span.rows + count, window + slack), 0))
        for window, span in content.spans.items()
    }
    return content._replace(offset=content.offset + count, spans=spans)


def _return_to(starts: Sequence[tuple[StageCache, int]]) -> None:
    for cache, start in starts:
        assert isinstance(cache, RemoteCache)
        cache.retreat(start)
