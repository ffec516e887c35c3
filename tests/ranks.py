"""Ranks as threads of this process, joined by queues: what `machines` does, without MPI.

Messages, owners and the link are the real ones; only the two calls that send and receive are not.
"""

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue

import mlx.core as mx
import numpy as np

from cognica_mlx.bench.sections.several_machines import part_of
from cognica_mlx.machines.link import Link
from cognica_mlx.machines.messages import Wire
from cognica_mlx.machines.owner import Owner
from cognica_mlx.machines.placement import parse
from cognica_mlx.machines.remote import RemoteStage
from cognica_mlx.network.model import PoEModel


class Group:
    """Where a process stands among others that are not there."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = lambda: rank, lambda: size


class Cables:
    """The connections of all ranks."""

    def __init__(self) -> None:
        self._queues: dict[tuple[int, int], SimpleQueue[np.ndarray]] = defaultdict(SimpleQueue)
        self._goes_on = threading.Event()
        self._goes_on.set()
        # Ranks that are dead: sending to them fails.
        self.dead: set[int] = set()

    def stop(self) -> None:
        """From now on no rank but 0 receives anything."""
        self._goes_on.clear()

    def go_on(self) -> None:
        """End `stop`."""
        self._goes_on.set()

    def send(self, words: mx.array, start: int, end: int) -> None:
        mx.eval(words)
        if end in self.dead:
            raise RuntimeError("broken pipe")
        self._queues[start, end].put(np.array(words))

    def receive(self, start: int, end: int) -> mx.array:
        words = self._queues[start, end].get()
        if end:
            self._goes_on.wait()
        return mx.array(words)


class Cable(Wire):
    """A rank's end of the cables."""

    def __init__(self, rank: int, size: int, cables: Cables, *, neighbors_only: bool = False):
        super().__init__(Group(rank, size), neighbors_only=neighbors_only)  # type: ignore[arg-type]
        self._cables = cables

    def _send(self, words: mx.array, rank: int) -> None:
        self._cables.send(words, self.rank, rank)

    def _receive(self, size: int, rank: int) -> mx.array:
        words = self._cables.receive(rank, self.rank)
        assert words.size == size
        return words


@dataclass
class Ranks:
    """A model split over threads: rank 0's model, its link, and the others' owners."""

    model: PoEModel
    link: Link
    cables: Cables
    owners: list[Owner] = field(default_factory=list)


@contextmanager
def on_threads(
    whole: PoEModel, split: str, *, timeout: float = 60, degrade: bool = False, ring: bool = False
) -> Iterator[Ranks]:
    """A base model split as `split` says."""
    shared, cables = parse(split, split.count("|") + 1, whole.poe_n_stages), Cables()
    size = max(shared.ranks) + 1
    wires = [Cable(rank, size, cables, neighbors_only=ring) for rank in range(size)]
    model = part_of(whole, shared.part(whole.config, 0))
    link = Link(wires[0], timeout, degrade=degrade)
    model.place({
        k: RemoteStage(model, model.config.stage_range(k), k, link=link, rank=rank, number=k)
        for k, rank in enumerate(shared.ranks)
        if rank
    })  # fmt: skip
    owners = [
        Owner(wire, {k: whole.stages[k] for k in shared.stages(wire.rank)}, {}, mx.float32)
        for wire in wires[1:]
    ]
    threads = [threading.Thread(target=_serve, args=[one], daemon=True) for one in owners]
    for thread in threads:
        thread.start()
    try:
        yield Ranks(model, link, cables, owners)
    finally:
        link.close()
        if not link.lost:
            for thread in threads:
                thread.join()


def _serve(owner: Owner) -> None:
    try:
        owner.serve()
    finally:
        mx.clear_streams()
