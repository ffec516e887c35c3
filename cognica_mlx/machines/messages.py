"""Messages between ranks: integers, then arrays, in one flat int32 array.

- a message is sent as a block of fixed size, plus a second array for what does not fit; most are
  one block
- over `ring` a rank reaches only its two neighbors, which forward messages for others
- knows nothing of stages; used by one thread at a time
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from itertools import accumulate, islice, pairwise
from math import prod

import mlx.core as mx
import numpy as np

from cognica_mlx.cache.hidden import Hidden
from cognica_mlx.errors import RankError, RankLostError, one_line

# Words of 4 bytes in a first block; two of them are the message's length and destination.
BLOCK = 256
FIRST = BLOCK - 2


class Kind(IntEnum):
    """What a message asks for."""

    END = 0
    # Run positions through a stage. Answered with a status, so that rank 0 knows who is behind.
    RUN = 1
    # Predict from positions. Answered with a status and logits.
    SCORE = 2
    # Send activations to rank 0, after a status; send them to another rank, which has been told to
    # expect them; copy them into separate arrays.
    FETCH = 3
    PASS = 4
    COPY = 5
    # Ask a neighbor for the next answer of a rank behind it.
    BRING = 6


# Housekeeping, in front of every message: copy a sequence's cache, drop it, drop activations.
FORK, DROP, FORGET = range(3)


def encode(numbers: Sequence[int], arrays: Sequence[mx.array] = ()) -> mx.array:
    """A message, unevaluated: (n,) int32. Arrays must fill whole words of 4 bytes."""
    head = mx.array([len(numbers), *numbers], dtype=mx.int32)
    return mx.concatenate([head, *(a.reshape(-1).view(mx.int32) for a in arrays)])


class Reader:
    """A message that has arrived, read from the beginning."""

    def __init__(self, words: mx.array):
        count: int = words[0].item()  # type: ignore[assignment]
        self._numbers: Iterator[int] = iter(words[1 : 1 + count].tolist())  # type: ignore[arg-type]
        # Sliced in the reading thread: an unevaluated array belongs to the thread that made it.
        self._words, self._start = words, 1 + count

    def number(self) -> int:
        """The next number."""
        return self.numbers(1)[0]

    def numbers(self, count: int) -> list[int]:
        """The next numbers."""
        found = list(islice(self._numbers, count))
        if len(found) < count:
            raise RankError("ranks have lost track of each other's messages")
        return found

    def arrays(self, *kinds: tuple[tuple[int, ...], mx.Dtype]) -> list[mx.array]:
        """The arrays after the numbers, of these shapes and types."""
        sizes = [prod(shape) * dtype.size // 4 for shape, dtype in kinds]
        spans = pairwise(accumulate(sizes, initial=self._start))
        return [
            self._words[start:stop].view(dtype).reshape(shape)
            for (start, stop), (shape, dtype) in zip(spans, kinds, strict=True)
        ]

    def text(self) -> str:
        """The remaining numbers as characters."""
        return "".join(map(chr, self._numbers))


def hidden_parts(hidden: Hidden) -> tuple[list[int], list[mx.array]]:
    """Activations (1, T, D) as numbers and arrays, for `read_hidden`."""
    tokens, x, backout = hidden.tokens.astype(mx.int32), hidden.x, hidden.backout
    parts = [[hidden.x0] if hidden.x0 is not x else [], [backout] if backout is not None else []]
    flags = len(parts[0]) + 2 * len(parts[1])
    return [flags, len(hidden), x.shape[-1]], [tokens, x, *parts[0], *parts[1]]


def read_hidden(message: Reader, dtype: mx.Dtype) -> Hidden:
    """Activations that `hidden_parts` took apart; their arrays come last in the message."""
    flags, count, width = message.numbers(3)
    parts = 1 + (flags & 1) + (flags >> 1)
    floats = [((1, count, width), dtype)] * parts
    tokens, x, *rest = message.arrays(((1, count), mx.int32), *floats)
    x0 = rest.pop(0) if flags & 1 else x
    return Hidden(tokens, x, x0, rest[0] if flags & 2 else None)


class Wire:
    """A rank's connections. Calls block until the other end has received or sent."""

    def __init__(self, group: mx.distributed.Group, *, neighbors_only: bool):
        self.group = group
        self.rank, self.size = group.rank(), group.size()
        self._neighbors_only = neighbors_only

    def next_hop(self, rank: int) -> int:
        """The rank that a message for `rank` goes to first."""
        return self._hop(self.rank, rank)

    def are_next(self, one: int, other: int) -> bool:
        """Whether two ranks reach each other directly."""
        return self._hop(one, other) == other

    def parent(self, rank: int | None = None) -> int:
        """The last rank on the way from rank 0 to `rank`, by default this one."""
        rank = self.rank if rank is None else rank
        at = 0
        while (hop := self._hop(at, rank)) != rank:
            at = hop
        return at

    def children(self) -> list[int]:
        """The ranks whose parent this one is."""
        return [rank for rank in range(1, self.size) if self.parent(rank) == self.rank]

    def _hop(self, at: int, rank: int) -> int:
        steps = (rank - at) % self.size
        if not self._neighbors_only or steps in (1, self.size - 1):
            return rank
        return (at + (1 if steps <= self.size // 2 else -1)) % self.size

    def send(self, words: mx.array, rank: int, to: int | None = None) -> None:
        """Send a message for rank `to` to its next hop `rank`."""
        to = rank if to is None else to
        first = words[:FIRST]
        block = mx.concatenate([mx.array([words.size, to], dtype=mx.int32), first])
        if block.size < BLOCK:
            block = mx.pad(block, (0, BLOCK - block.size))
        self._send(block, rank)
        if words.size > FIRST:
            self._send(words[FIRST:], rank)

    def receive(self, rank: int) -> tuple[int, mx.array]:
        """The next message from the neighbor `rank`: the `to` that `send` was given, and its
        words."""
        block = self._receive(BLOCK, rank)
        size, to = map(int, np.array(block[:2]))
        words = block[2 : 2 + min(size, FIRST)]
        if size > FIRST:
            words = mx.concatenate([words, self._receive(size - FIRST, rank)])
        mx.eval(words)
        return to, words

    def answer(self, words: mx.array, rank: int | None = None) -> None:
        """Send an answer of `rank`, by default this one's, towards rank 0."""
        self.send(words, self.parent(), self.rank if rank is None else rank)

    def _send(self, words: mx.array, rank: int) -> None:
        with _connected(rank):
            mx.eval(mx.distributed.send(words, rank, group=self.group, stream=mx.cpu))

    def _receive(self, size: int, rank: int) -> mx.array:
        with _connected(rank):
            words = mx.distributed.recv((size,), mx.int32, rank, group=self.group, stream=mx.cpu)
            mx.eval(words)
        return words


@contextmanager
def _connected(rank: int) -> Iterator[None]:
    """A call to MLX that raises RankLostError if there is no connection with `rank`."""
    try:
        yield
    except RuntimeError as error:
        raise RankLostError(f"the connection with rank {rank} is lost: {one_line(error)}") from None


class Inbox:
    """What arrives from others: answers, sorted by the rank that gives them, and activations.

    On a ring everything from one side comes through one neighbor, in any order.
    """

    # Marks activations, in the place of a destination.
    ROWS = -1

    def __init__(self, wire: Wire):
        self._wire = wire
        self._early: dict[tuple[int, int], deque[mx.array]] = defaultdict(deque)
        self._asked: dict[int, int] = defaultdict(int)

    def answer(self, rank: int) -> mx.array:
        """The next answer of `rank` to rank 0."""
        hop = self._wire.next_hop(rank)
        found = self._early[hop, rank]
        while not found:
            if hop != rank and not self._asked[hop]:
                self._wire.send(encode([0, Kind.BRING, rank]), hop)
                self._asked[hop] += 1
            self._receive(hop)
        return found.popleft()

    def rows(self, rank: int) -> mx.array:
        """The next activations from the neighbor `rank`."""
        found = self._early[rank, self.ROWS]
        while not found:
            self._receive(rank)
        return found.popleft()

    def _receive(self, hop: int) -> None:
        about, words = self._wire.receive(hop)
        if about not in (hop, self.ROWS):
            self._asked[hop] -= 1
        self._early[hop, about].append(words)
