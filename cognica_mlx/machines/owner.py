"""The other end: a rank that owns stages and carries out rank 0's messages until the last.

- in: messages; out: statuses, activations, predictions
- holds each sequence's cache for each of its stages, and activations while rank 0 refers to them
- a pass that fails leaves its caches as they were and reports the error to rank 0
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from cognica_mlx.cache.hidden import Hidden, Rows, beginnings, pack
from cognica_mlx.cache.keys_and_values import KeysAndValues
from cognica_mlx.errors import RankError, one_line
from cognica_mlx.machines.messages import (
    FORGET,
    FORK,
    Inbox,
    Kind,
    Reader,
    Wire,
    encode,
    hidden_parts,
    read_hidden,
)
from cognica_mlx.machines.remote import BODY, FROM
from cognica_mlx.network.stages import Stage

# Predicts (1, T, V) from activations (1, T, D); if the flag is set they are a base stage's, and the
# prediction is a draft.
Speaker = Callable[[Hidden, bool], mx.array]


class Owner:
    """Stages and, for those with heads here, predictors, by the numbers that rank 0 gave them."""

    def __init__(
        self, wire: Wire, stages: dict[int, Stage], speakers: dict[int, Speaker], dtype: mx.Dtype
    ):
        self.wire, self.stages, self.speakers, self.dtype = wire, stages, speakers, dtype
        self.parent = wire.parent()
        self._inbox = Inbox(wire)
        self.caches: dict[int, KeysAndValues] = {}
        self.given: dict[int, Hidden] = {}

    def serve(self) -> None:
        """Carry out messages until the last."""
        works = {Kind.RUN: self._run, Kind.SCORE: self._score, Kind.FETCH: self._fetch}
        while True:
            to, words = self.wire.receive(self.parent)
            if to != self.wire.rank:
                self.wire.send(words, self.wire.next_hop(to), to)
                continue
            message = Reader(words)
            self._keep_house(message)
            kind = Kind(message.number())
            if kind is Kind.END:
                return
            if kind is Kind.PASS:
                to = message.number()
                self.wire.send(_answer(self._fetch, message), to, Inbox.ROWS)
            elif kind in works:
                self.wire.answer(_answer(works[kind], message))
            elif kind is Kind.COPY:
                self._copy(message)
            elif kind is Kind.BRING:
                rank = message.number()
                self.wire.answer(self._inbox.answer(rank), rank)

    def _keep_house(self, message: Reader) -> None:
        """Copy or drop sequences, and drop activations."""
        todo = message.numbers(message.number())
        for what, one, other in zip(todo[::3], todo[1::3], todo[2::3], strict=True):
            if what == FORK:
                # After an interruption, rank 0 may send this again.
                if other in self.caches and one not in self.caches:
                    self.caches[one] = self.caches[other].fork()
            elif what == FORGET:
                self.given.pop(one, None)
            else:
                self.caches.pop(one, None)

    def _held(self, message: Reader) -> Hidden:
        """Activations that are here, as named by `Elsewhere.named`."""
        pieces = []
        for _ in range(message.number()):
            name, start, stop = message.numbers(3)
            if name not in self.given:
                raise RankError("what this pass needs was lost when an earlier one failed")
            pieces.append(Rows(self.given[name], start, stop))
        return pack(pieces)

    def _input(self, message: Reader) -> Hidden:
        """The positions that a message refers to."""
        source = message.number()
        if source == BODY:
            return read_hidden(message, self.dtype)
        if source == FROM:
            sent = Reader(self._inbox.rows(message.number()))
            if sent.number():
                raise RankError(sent.text())
            return read_hidden(sent, self.dtype)
        return self._held(message)

    def _run(self, message: Reader) -> tuple[list[int], list[mx.array]]:
        number, name, count = message.numbers(3)
        asked = [message.numbers(4) for _ in range(count)]
        hidden = self._input(message)  # first, as what was sent here must be received in any case
        stage = self.stages[number]
        caches = [self._cache(stage, *about) for about in asked]
        counts = [rows for _, _, rows, _ in asked]
        order = stage.order(caches, counts)
        hidden = _in_order(hidden, beginnings(counts), counts, order)
        caches, counts = ([part[i] for i in order] for part in (caches, counts))  # type: ignore
        plan = stage.plan(caches, counts)
        given, done = stage.run(hidden, plan)
        given = _in_order(given, plan.starts, counts, [order.index(i) for i in range(count)])
        mx.eval(given.arrays())
        for cache, one in zip(caches, done, strict=True):
            cache.commit(one)
        mx.eval([array for cache in caches for array in cache.arrays()])
        for cache in caches:
            cache.next_round()
        self.given[name] = given
        return [], []

    def _cache(self, stage: Stage, number: int, start: int, rows: int, slack: int) -> KeysAndValues:
        """A sequence's cache, rolled back to the start of its pass."""
        cache = self.caches.get(number) or stage.new_cache(slack)
        if cache.offset < start:
            raise RankError(f"a sequence holds {cache.offset} of {start} positions")
        if cache.offset > start:
            cache.rollback(start)
        self.caches[number] = cache
        return cache

    def _score(self, message: Reader) -> tuple[list[int], list[mx.array]]:
        number, drafts = message.numbers(2)
        return [], [self.speakers[number](self._input(message), bool(drafts))]

    def _fetch(self, message: Reader) -> tuple[list[int], list[mx.array]]:
        return hidden_parts(self._held(message))

    def _copy(self, message: Reader) -> None:
        name = message.number()
        try:
            hidden = self._held(message)
        except RankError:
            return  # reported when it is needed
        self.given[name] = hidden.copy(0, len(hidden))
        mx.eval(self.given[name].arrays())


def _answer(
    work: Callable[[Reader], tuple[list[int], list[mx.array]]], message: Reader
) -> mx.array:
    """A status and the result of `work`, or the error it raised, as words."""
    try:
        numbers, arrays = work(message)
        words = encode([0, *numbers], arrays)
        mx.eval(words)
    except Exception as error:
        words = encode([1, *map(ord, one_line(error))])
    return words


def _in_order(
    hidden: Hidden, starts: Sequence[int], counts: Sequence[int], order: Sequence[int]
) -> Hidden:
    """The parts of `hidden`, `counts` positions from `starts`, in the given order."""
    return pack([Rows(hidden, starts[i], starts[i] + counts[i]) for i in order])
