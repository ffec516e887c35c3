"""Rank 0's end: one thread sends all messages, in the order in which they are posted.

- in: messages for other ranks, from the thread that decodes
- out: answers; waiting for one raises an error that names the rank if it exceeds the time limit
- MLX's communication calls block and cannot be interrupted. Only this thread makes them, so if a
  rank is lost, only this thread is stuck and can be abandoned: see `Link.lost`

Every pass is answered with a status. Statuses are read before the next answer, oldest first. So if
something hangs, the rank being waited for is the one that hangs, not another that waits for it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from queue import Full, Queue

import mlx.core as mx

from cognica_mlx.backend.streams import end_with_thread
from cognica_mlx.errors import RankError, RankLostError
from cognica_mlx.machines.messages import Inbox, Kind, Reader, Wire, encode

TIMEOUT = 60.0
# How many messages may wait to be sent, and how many statuses may be left unread.
WAITING, UNREAD = 8, 8
# Messages have numbers below this; after so many they start over.
NUMBERS = 1 << 31
# Seconds between looks at the clock.
TICK = 0.5


@dataclass(frozen=True, eq=False)
class _Task:
    """A message, where its answer goes, how to undo its effects on rank 0 if it fails, and a second
    message that belongs to it. `last` says that its rank ends with it."""

    rank: int
    words: mx.array
    answer: Future[Reader] | None = None
    undo: Callable[[], None] | None = None
    then: _Task | None = None
    last: bool = False


class Link:
    """Rank 0's connection with all others.

    `timeout` is how many seconds another rank may take for one pass or one message. With `degrade`
    decoding goes on without ranks that are lost.
    """

    def __init__(self, wire: Wire, timeout: float = TIMEOUT, *, degrade: bool = False):
        self.wire, self.timeout, self.degrade = wire, timeout, degrade
        self._inbox = Inbox(wire)
        # Set once a rank is lost; after that nothing is sent any more.
        self.lost: RankLostError | None = None
        self._numbers = count(1)
        # Housekeeping by rank, sent in front of its next message. Finalizers add to it at any time.
        self._news: dict[int, deque[int]] = {r: deque() for r in range(1, wire.size)}
        self._tasks: Queue[_Task | None] = Queue(WAITING)
        self._unread: deque[_Task] = deque()
        self._failed: deque[tuple[_Task, RankError]] = deque()
        # The rank being waited for, and since when.
        self._busy: tuple[int, float] | None = None
        self._thread = threading.Thread(target=self._run, name="cognica-mlx link", daemon=True)
        self._thread.start()

    # Called by the thread that decodes

    def number(self) -> int:
        """A new unique number, for a sequence's cache or for activations."""
        return next(self._numbers) % NUMBERS

    def tell(self, rank: int, *numbers: int) -> None:
        """Send housekeeping to a rank, along with its next message."""
        if not self.lost:
            self._news[rank].extend(numbers)

    def post(
        self,
        rank: int,
        kind: Kind,
        numbers: Sequence[int],
        arrays: Sequence[mx.array] = (),
        undo: Callable[[], None] | None = None,
        then: tuple[int, Kind, Sequence[int]] | None = None,
    ) -> None:
        """Send a message that has no answer, once `arrays` are computed. If the pass it asks for
        fails, `undo` is called in the thread that decodes. `then` is a second message: an
        interruption stops both, or neither."""
        with self._worded(rank, kind, numbers, arrays) as words:
            if then is None:
                self._put(_Task(rank, words, None, undo))
                return
            with self._worded(*then) as more:
                self._put(_Task(rank, words, None, undo, _Task(then[0], more)))

    def ask(
        self, rank: int, kind: Kind, numbers: Sequence[int], arrays: Sequence[mx.array] = ()
    ) -> Callable[[], Reader]:
        """Send a message that has an answer, and return a function that waits for it.

        That function raises RankError if this request or an earlier pass failed (failed passes have
        then been undone), RankLostError if a rank is gone.
        """
        with self._worded(rank, kind, numbers, arrays) as words:
            task = _Task(rank, words, Future())
            self._put(task)
        return lambda: self._wait(task)

    def close(self) -> None:
        """End the loops of the other ranks."""
        if self.lost:
            return
        try:
            for rank in range(1, self.wire.size)[::-1]:
                # The furthest first: a rank that has ended no longer forwards messages.
                with self._worded(rank, Kind.END, ()) as words:
                    self._put(_Task(rank, words, last=True))
            self._put(None)
            while self._thread.is_alive():
                self._thread.join(TICK)
                self._check()
        except RankLostError:
            return  # the caller looks at `ended`

    @property
    def ended(self) -> bool:
        """Whether `close` has ended the loops of all other ranks."""
        return not self.lost and not self._thread.is_alive()

    @contextmanager
    def _worded(
        self, rank: int, kind: Kind, numbers: Sequence[int], arrays: Sequence[mx.array] = ()
    ) -> Iterator[mx.array]:
        """A message to be sent in the block, with the rank's housekeeping in front, which the next
        message takes over if the block is interrupted."""
        news = self._news[rank]
        told = [news.popleft() for _ in range(len(news))]
        try:
            words = encode([len(told), *told, kind, *numbers], arrays)
            mx.eval(words)
            yield words
        except BaseException:
            news.extendleft(reversed(told))
            raise

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
        """Undo failed passes, the latest first, and raise the first error."""
        error = None
        while self._failed:
            task, error = self._failed.pop()
            if task.undo:
                task.undo()
        if error:
            raise error

    def _check(self) -> None:
        """Raise RankLostError if a rank is gone or has taken too long."""
        busy = self._busy
        if not self.lost and busy and time.monotonic() - busy[1] > self.timeout:
            rank = busy[0]
            self.lost = RankLostError(f"rank {rank} has not answered for {self.timeout:g} seconds")
        if self.lost:
            raise self.lost

    # In the link's own thread

    def _run(self) -> None:
        end_with_thread()
        while task := self._tasks.get():
            try:
                self._carry_out(task)
            except Exception as error:
                rank = self._busy[0] if self._busy else task.rank
                said = f"the connection with rank {rank} is lost: {error!r}"
                self.lost = error if isinstance(error, RankLostError) else RankLostError(said)
                return

    def _carry_out(self, task: _Task) -> None:
        # A rank that has ended no longer answers, nor forwards other ranks' answers.
        while len(self._unread) >= (1 if task.last else UNREAD):
            self._read_status()
        hop = self.wire.next_hop(task.rank)
        with self._waiting_for(task.rank):
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
        if task.then:
            self._carry_out(task.then)

    def _read_status(self) -> None:
        task = self._unread.popleft()
        if error := _error(task.rank, self._receive(task.rank)):
            self._failed.append((task, error))

    @contextmanager
    def _waiting_for(self, rank: int) -> Iterator[None]:
        """Note that `rank` is being waited for, until the block succeeds."""
        self._busy = rank, time.monotonic()
        yield
        self._busy = None

    def _receive(self, rank: int) -> Reader:
        """A rank's next answer."""
        with self._waiting_for(rank):
            return Reader(self._inbox.answer(rank))


def _error(rank: int, message: Reader) -> RankError | None:
    """The error that an answer reports, or None."""
    return RankError(f"rank {rank}: {message.text()}") if message.number() else None
