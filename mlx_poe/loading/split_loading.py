"""A model loaded on several machines: every rank loads its part.

- in: the same arguments on every rank, started by `mlx.launch` or `mpirun`
- out: on rank 0 a model that decodes like any other; the other ranks serve it until it ends
- ranks synchronize after every step that can fail: if one of them cannot start, none goes on
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import mlx.core as mx
from mlx.utils import tree_flatten

from cognica_mlx.cache.hidden import Hidden
from cognica_mlx.config import PoEConfig
from cognica_mlx.errors import RankError, RequestError, one_line
from cognica_mlx.files.byte_sizes import size_text
from cognica_mlx.machines.link import TIMEOUT, Link
from cognica_mlx.machines.messages import Wire
from cognica_mlx.machines.owner import Owner, Speaker
from cognica_mlx.machines.placement import Part, Split, balanced, parse, seconds_here
from cognica_mlx.machines.remote import RemoteStage
from cognica_mlx.network.model import PoEModel
from mlx_poe.loading.specialists import Specialists
from mlx_poe.loading.tokenizer import Tokenizer

# The flag's value for a split that the ranks work out themselves.
STAGES = "stages"
# Environment variables by which launchers choose these back ends.
RING_VARIABLE, JACCL_VARIABLE = "MLX_HOSTFILE", "MLX_IBV_DEVICES"
# How many times as long as a pass loading may take.
LOADING = 10

Result = TypeVar("Result")
# Returns the part that a rank holds of a model of this configuration and type.
Choose = Callable[[PoEConfig, mx.Dtype], Part]


@dataclass
class Loaded:
    """The model that rank 0 decodes with, and how it is split. `status` is this process's exit
    status if it has to be ended because a rank is lost; set it before leaving the block."""

    specialists: Specialists
    tokenizer: Tokenizer | None
    split: Split
    status: int = 0

    @property
    def model(self) -> PoEModel:
        """The base."""
        return self.specialists.base


@contextmanager
def on_machines(
    load_base: Callable[[Choose], tuple[PoEModel, Tokenizer | None]],
    split: str,
    specialists: Sequence[tuple[str, Callable[[Specialists], object]]] = (),
    *,
    timeout: float = TIMEOUT,
    degrade: bool = False,
) -> Iterator[Loaded | None]:
    """Load each rank's part of a model, and specialists over it.

    `load_base` is called with a function that returns this rank's part for a configuration and a
    type; `specialists` are names, each with a function that attaches it. `split` is "stages" or a
    text for `placement.parse`. On ranks other than 0 the block runs once rank 0 has left its
    own, and gets None. If a rank takes more than `timeout` seconds for a pass, decoding ends with a
    RankLostError, or with `degrade` goes on with the stages that rank 0 holds. If a rank takes
    `LOADING` times as long to load its part, rank 0 prints its number and ends the process.

    Raises RequestError if no ranks have been started or the split does not fit them, RankError if
    another rank cannot load its part.
    """
    rank = _Rank(split, [name for name, _ in specialists], LOADING * timeout)
    model, tokenizer = rank.together(lambda: load_base(rank.part))
    owned = Specialists(model, rank.is_here)
    for _, attach in specialists:
        rank.together(partial(attach, owned))
    models = [model, *(owned.use(title) for title in owned.names)]
    rank.announce(models)
    if rank.wire.rank:
        rank.serve(model, owned)
        yield None
        return
    link = Link(rank.wire, timeout, degrade=degrade)
    rank.place(link, model, owned)
    loaded, status = Loaded(owned, tokenizer, rank.split), 1
    try:
        yield loaded
        status = loaded.status
        if link.lost:
            print(f"went on without the others: {link.lost}", file=sys.stderr)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT  # as shells have it
        raise
    finally:
        known = link.lost
        try:
            link.close()  # a second Ctrl-C ends the wait for a rank that hangs
        finally:
            if not link.ended:
                # The link's thread may still wait for the lost rank, and would keep the process
                # alive.
                atexit.register(_leave, status)
        if link.lost and not known:
            print(f"the others have not ended: {link.lost}", file=sys.stderr)


@contextmanager
def _limited(late: str, limit: float) -> Iterator[None]:
    """End the process if waiting for the rank `late` takes longer: a call that waits for a rank
    cannot be interrupted."""
    timer = threading.Timer(limit, _give_up, (late, limit))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(late: str, limit: float) -> None:
    print(f"error: {late} has not loaded its part for {limit:g} seconds", file=sys.stderr)
    _leave(1)


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _Disagreed(RankError):
    """Another rank has failed, and every rank knows it."""


class _Rank:
    """This process while the ranks work out the split and load their parts."""

    def __init__(self, split: str, specialists: Sequence[str], limit: float):
        self.wire, self._limit = _join(), limit
        self._text, self._specialists = split, specialists
        self.split = Split(())
        self._base = 0

    def part(self, config: PoEConfig, dtype: mx.Dtype) -> Part:
        """This rank's part of the base, after comparing the speed of the ranks if need be."""
        self._base = config.poe_n_stages
        size, names = self.wire.size, self._specialists
        if self._text == STAGES:
            seconds = self._exchange(1.0 + seconds_here(config, dtype))
            if min(seconds) < 1:
                raise _Disagreed(
                    f"rank {seconds.index(min(seconds))} could not start; see its error"
                )
            self.split = balanced(config, [s - 1 for s in seconds], names)
        else:
            self.split = parse(self._text, size, self._base, names)
        rank = self.wire.rank
        return self.split.part(config, rank, speaks=max(self.split.stages(rank)) >= self._base)

    def is_here(self, index: int) -> bool:
        """Whether this rank holds the `index`-th specialist. Those attached later are rank 0's."""
        owners = self.split.ranks[self._base :]
        return (owners[index] if index < len(owners) else 0) == self.wire.rank

    def together(self, work: Callable[[], Result]) -> Result:
        """Do work that all ranks do. RankError if it fails on another rank."""
        try:
            result = work()
        except _Disagreed:
            raise
        except Exception:
            self._exchange(0.0)
            raise
        if 0.0 in (done := self._exchange(1.0)):
            raise _Disagreed(f"rank {done.index(0.0)} could not load its part; see its error")
        return result

    def _exchange(self, number: float) -> list[float]:
        """Each rank's number, collected from neighbor to neighbor and then handed back."""
        wire = self.wire
        numbers = mx.where(mx.arange(wire.size) == wire.rank, number, 0.0)
        for rank in wire.children():
            # If a rank that `rank` forwards for hangs, rank 0 cannot tell which of them it is.
            via = [str(r) for r in range(1, wire.size) if wire.next_hop(r) == rank]
            late = f"rank {' or '.join(via)}"
            with nullcontext() if wire.rank else _limited(late, self._limit):
                numbers += wire.receive(rank)[1].view(mx.float32)
        if wire.rank:
            wire.send(numbers.view(mx.int32), wire.parent())
            numbers = wire.receive(wire.parent())[1].view(mx.float32)
        for rank in wire.children():
            wire.send(numbers.view(mx.int32), rank)
        return numbers.tolist()  # type: ignore[return-value]

    def announce(self, models: Sequence[PoEModel]) -> None:
        """Print on rank 0's stderr how much each rank holds."""
        bytes_of: dict[int, int] = {}
        for model in models:
            arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
            bytes_of |= {id(array): array.nbytes for array in arrays.values()}
        held = self._exchange(float(sum(bytes_of.values())))
        if self.wire.rank:
            return
        titles = [*(f"stage {k}" for k in range(self._base)), *self._specialists]
        for rank, count in enumerate(held):
            stages = ", ".join(titles[k] for k in self.split.stages(rank))
            print(f"rank {rank} holds {stages}: {size_text(count)}", file=sys.stderr)

    def place(self, link: Link, model: PoEModel, specialists: Specialists) -> None:
        """Replace the stages of rank 0's models that other ranks hold by remote stages."""

        def remote(of: PoEModel, stage: int, number: int, speaks: bool = False) -> RemoteStage:
            layers, rank = of.config.stage_range(stage), self.split.ranks[number]
            return RemoteStage(
                of, layers, stage, link=link, rank=rank, number=number, speaks=speaks
            )

        base = self._base
        model.place({k: remote(model, k, k) for k in range(base) if self.split.ranks[k]})
        for i, name in enumerate(specialists.names):
            if not self.is_here(i):
                special = specialists.use(name)
                special.place({base: remote(special, base, base + i, speaks=True)})

    def serve(self, model: PoEModel, specialists: Specialists) -> None:
        """Carry out rank 0's messages until it ends."""
        stages = {k: model.stages[k] for k in self.split.stages(self.wire.rank) if k < self._base}
        speakers: dict[int, Speaker] = {}
        for i, name in enumerate(specialists.names):
            if self.is_here(i):
                special = specialists.use(name)
                stages[self._base + i] = special.stages[self._base]
                speakers[self._base + i] = _speaker(special)
        # Ctrl-C reaches every process in a terminal; rank 0 handles it and ends the others.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        Owner(self.wire, stages, speakers, model.resid_lambdas.dtype).serve()


def _speaker(model: PoEModel) -> Speaker:
    last = model.poe_n_stages - 1

    def predict(hidden: Hidden, drafts: bool) -> mx.array:
        return model.draft_logits(last, hidden) if drafts else model.stage_logits(last, hidden)

    return predict


def _join() -> Wire:
    """This process's connections with the others. RequestError if none have been started, RankError
    if they cannot be reached."""
    ring = RING_VARIABLE in os.environ
    backend = "ring" if ring else "jaccl" if JACCL_VARIABLE in os.environ else "mpi"
    try:
        group = mx.distributed.init(strict=True, backend=backend)
    except RuntimeError as error:
        if backend != "mpi":
            raise RankError(f"the other ranks cannot be reached: {one_line(error)}") from None
        raise RequestError(f"{_ALONE} ({error})") from None
    if group.size() < 2:
        raise RequestError(_ALONE)
    return Wire(group, neighbors_only=ring)


_ALONE = (
    "--split needs several processes: start the command on each machine with "
    "mlx.launch --hosts a,b -- …, or on one with mpirun -n 2 …"
)
