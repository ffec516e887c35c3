"""Rank 0's end: messages go out in the order in which they are posted, from a thread of their own.

- in: messages for ranks, from whatever thread decodes
- out: futures; whoever waits for one is told, within a time limit, which rank does not answer
- MLX's calls block and cannot be given up. So nothing but this thread makes them, and where a rank
  is lost the thread is left behind: see `Link.lost`

Every pass is answered with a status. Statuses are read before the next answer, oldest first, so
that the rank that is waited for is the one that is behind, and not one that waits for it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from itertools import count
from queue import Full, Queue

import mlx.core as mx

from cognica_mlx.errors import RankError, RankLostError
from cognica_mlx.machines.messages import Inbox, Kind, Reader, Wire, encode

TIMEOUT = 60.0
# Messages that may wait to be sent, and passes whose status may be left unread.
WAITING, UNREAD = 8, 8
# Seconds between looks at the clock.
TICK = 0.5


@dataclass(frozen=True, eq=False)
class _Task:
    """A message, where its answer goes, and how to take back what it was to do if it fails."""

    rank: int
    words: mx.array
    answer: Future[Reader] | None = None
    undo: Callable[[], None] | None = None


class Link:
    """Rank 0's connection with all others.

    `timeout` is how many seconds a single step of another rank may take: one pass, one message.
    `degrade` says whether to go on without ranks that are lost.
    """

    def __init__(self, wire: Wire, timeout: float = TIMEOUT, *, degrade: bool = False):
        self.wire, self.timeout, self.degrade = wire, timeout, degrade
        self._inbox = Inbox(wire)
        # Why ranks will not be asked again.
        self.lost: RankLostError | None = None
        self._numbers = count(1)
        # By rank, to go in front of its next message. Garbage collection adds to it at any time.
        self._news: dict[int, deque[int]] = {r: deque() for r in range(1, wire.size)}
        self._tasks: Queue[_Task | None] = Queue(WAITING)
        self._unread: deque[_Task] = deque()
        self._failed: deque[tuple[_Task, RankError]] = deque()
        # The rank that is being waited for, and since when.
        self._busy: tuple[int, float] | None = None
        self._thread = threading.Thread(target=self._run, name="cognica-mlx link", daemon=True)
        self._thread.start()

    # For those who decode

    def number(self) -> int:
        """A number that nothing else has: for a sequence's cache, or for activations."""
        return next(self._numbers)

    def tell(self, rank: int, *numbers: int) -> None:
        """Housekeeping, which goes along with the next message to that rank."""
        self._news[rank].extend(numbers)

    def post(
        self,
        rank: int,
        kind: Kind,
        numbers: Sequence[int],
        arrays: Sequence[mx.array] = (),
        undo: Callable[[], None] | None = None,
    ) -> None:
        """Send a message that gives no answer. Waits for what is in `arrays`; `undo` is called, in
        a thread that decodes, if the pass that it asks for fails."""
        self._put(_Task(rank, self._words(rank, kind, numbers, arrays), None, undo))

    def ask(
        self, rank: int, kind: Kind, numbers: Sequence[int], arrays: Sequence[mx.array] = ()
    ) -> Callable[[], Reader]:
        """Send a message that gives an answer, and return what waits for it.

        That raises RankError where the rank could not do what it was asked, or an earlier pass
        failed, which has then been taken back; RankLostError where a rank is gone.
        """
        task = _Task(rank, self._words(rank, kind, numbers, arrays), Future())
        self._put(task)
        return lambda: self._wait(task)

    def close(self) -> None:
        """Let the other ranks go."""
        if self.lost:
            return
        try:
            for rank in range(1, self.wire.size)[::-1]:
                # Those further on first: a rank that has ended passes nothing on.
                self.post(rank, Kind.END, ())
            self._put(None)
            while self._thread.is_alive():
                self._thread.join(TICK)
                self._check()
        except RankLostError:
            return  # `lost` says so

    def _words(
        self, rank: int, kind: Kind, numbers: Sequence[int], arrays: Sequence[mx.array]
    ) -> mx.array:
        news = self._news[rank]
        told = [news.popleft() for _ in range(len(news))]
        words = encode([len(told), *told, kind, *numbers], arrays)
        mx.eval(words)
        return words

    def _put(self, task: _Task | None) -> None:
        while True:
            self._check()
            try:
                return self._tasks.put(task, timeout=TICK)
            except Full:
                continue

    def _wait(self, task: _Task) -> Reader:
        assert task.answer is not None
        while True:
            try:
                answer = task.answer.result(timeout=TICK)
            except NotYet:
                self._check()
                continue
            except RankLostError:
                raise
            except RankError as error:
                self._take_back()
                raise error from None
            self._take_back()
            return answer

    def _take_back(self) -> None:
        """Undo what has failed, the latest first, and raise the first of the errors."""
        error = None
        while self._failed:
            task, error = self._failed.pop()
            if task.undo:
                task.undo()
        if error:
            raise error

    def _check(self) -> None:
        """Raise RankLostError where a rank is gone, or has taken too long."""
        busy = self._busy
        if not self.lost and busy and time.monotonic() - busy[1] > self.timeout:
            rank = busy[0]
            self.lost = RankLostError(f"rank {rank} has not answered for {self.timeout:g} seconds")
        if self.lost:
            raise self.lost

    # In the link's own thread

    def _run(self) -> None:
        while task := self._tasks.get():
            try:
                self._carry_out(task)
            except Exception as error:
                rank = self._busy[0] if self._busy else task.rank
                self.lost = RankLostError(f"the connection with rank {rank} is lost: {error}")
                return
        # A stream that outlives its thread takes the process down when that ends.
        mx.clear_streams()

    def _carry_out(self, task: _Task) -> None:
        while len(self._unread) >= UNREAD:
            self._read_status()
        hop = self.wire.next_hop(task.rank)
        with _Waiting(self, task.rank):
            self.wire.send(task.words, hop, task.rank)
        if task.answer:
            while self._unread:
                self._read_status()
            message = self._receive(task.rank)
            if error := _error(task.rank, message):
                task.answer.set_exception(error)
            else:
                task.answer.set_result(message)
        elif task.undo:
            self._unread.append(task)

    def _read_status(self) -> None:
        task = self._unread.popleft()
        if error := _error(task.rank, self._receive(task.rank)):
            self._failed.append((task, error))

    def _receive(self, rank: int) -> Reader:
        """What a rank answers."""
        with _Waiting(self, rank):
            return Reader(self._inbox.answer(rank))


class _Waiting:
    """While inside, it is this rank that is waited for."""

    def __init__(self, link: Link, rank: int):
        self._link, self._rank = link, rank

    def __enter__(self) -> None:
        self._link._busy = self._rank, time.monotonic()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._link._busy = None


def _error(rank: int, message: Reader) -> RankError | None:
    """What an answer's status says went wrong."""
    return RankError(f"rank {rank}: {message.text()}") if message.number() else None
