"""Traces: the graph of a function of arrays, built once by Python and replayed from then on.

A small model's token is bound by the host, which builds its graph; a replay takes a fraction of the
time. `mx.compile` does this. On a GPU it also fuses operations. On the CPU fusing would call a C++
compiler, seconds for each new kernel, so MLX is told not to fuse; it can be asked for.

- a function must depend on nothing but its arrays and its key: a Python number in it is a constant
  of the trace
- a trace keeps the arrays that its function closes over, so it belongs to their owner (`Traces`),
  and ends with it
- a function is traced when the same key comes back, so that what happens once costs nothing
- MLX's traces belong to a thread; each thread has its own
- the environment variable MLX_POE_TRACE turns this off ("0"), or fuses on the CPU too ("fuse")
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import mlx.core as mx

VARIABLE = "MLX_POE_TRACE"
# A function is traced at its USES-th use, and each owner keeps at most MOST traces.
USES, MOST = 4, 48
# MLX's CompileMode, which Python cannot set.
_SET_MODE = "_ZN3mlx4core16set_compile_modeENS0_11CompileModeE"
_NO_FUSE, _ENABLED = 2, 3

Function = Callable[..., Sequence[mx.array]]


@dataclass
class Statistics:
    """What this process did so far: traces made and dropped again, replays, seconds of tracing."""

    traces: int = 0
    replays: int = 0
    evicted: int = 0
    seconds: float = 0.0


class _Here(threading.local):
    tracing = False
    off = False

    def __init__(self) -> None:
        self.thread = object()  # unlike its number, never given to another


_here = _Here()
_lock = threading.Lock()
_statistics = Statistics()


def statistics() -> Statistics:
    """See `Statistics`; a copy."""
    return replace(_statistics)


def enabled() -> bool:
    """Whether functions are traced in this thread."""
    return not _here.off and os.environ.get(VARIABLE, "1") != "0" and _can_trace()


@contextmanager
def off() -> Iterator[None]:
    """Trace nothing in this thread."""
    before, _here.off = _here.off, True
    try:
        yield
    finally:
        _here.off = before


def constant(array: mx.array) -> mx.array:
    """An array made from constants only: computed now if this is a trace, or every replay would
    compute it again."""
    if _here.tracing:
        mx.eval(array)
    return array


class Traces:
    """The traces of one owner's functions, by key."""

    def __init__(self) -> None:
        self._made: OrderedDict[Hashable, Function] = OrderedDict()
        self._uses: dict[Hashable, int] = {}
        self._arrays: tuple[mx.array, ...] = ()

    def __len__(self) -> int:
        return len(self._made)

    def made_of(self, arrays: Sequence[mx.array]) -> None:
        """Drop all traces unless the arrays are those of the last call: the arrays that functions
        close over."""
        if list(map(id, arrays)) != list(map(id, self._arrays)):
            self.clear()
            self._arrays = tuple(arrays)

    def clear(self) -> None:
        """Drop all traces, and with them the arrays that they keep."""
        self._made.clear()
        self._uses.clear()
        self._arrays = ()

    def run(
        self, key: Hashable, function: Function, arrays: Sequence[mx.array]
    ) -> Sequence[mx.array]:
        """`function(*arrays)`, replayed if it has been traced under this key in this thread. The
        key must tell apart whatever makes another graph, shapes included."""
        if not enabled():
            return function(*arrays)
        place = key, _here.thread
        if (trace := self._made.get(place)) is not None:
            self._made.move_to_end(place)
            _statistics.replays += 1
            return trace(*arrays)
        uses = self._uses[place] = self._uses.get(place, 0) + 1
        if uses < USES:
            if len(self._uses) > 16 * MOST:
                self._uses.clear()
            return function(*arrays)
        return self._trace(place, function, arrays)

    def _trace(
        self, place: Hashable, function: Function, arrays: Sequence[mx.array]
    ) -> Sequence[mx.array]:
        started = time.perf_counter()

        # Dropped once traced: the owner, which the function may refer to, would never end.
        functions = [function]

        def traced(*arrays: mx.array) -> Sequence[mx.array]:
            before, _here.tracing = _here.tracing, True
            try:
                return list(functions[0](*arrays))
            finally:
                _here.tracing = before

        made = mx.compile(traced)
        with _unfused():
            result = made(*arrays)
        functions.clear()
        del self._uses[place]
        self._made[place] = made
        if len(self._made) > MOST:
            self._made.popitem(last=False)
            _statistics.evicted += 1
        _statistics.traces += 1
        _statistics.seconds += time.perf_counter() - started
        return result


@cache
def _set_mode() -> Callable[[int], None] | None:
    """MLX's function for it, or None in a build that lacks it."""
    for library in (Path(mx.__file__).parent / "lib").glob("libmlx.*"):
        function = getattr(ctypes.CDLL(str(library)), _SET_MODE, None)
        if function is not None:
            function.argtypes, function.restype = [ctypes.c_int], None
            set_mode: Callable[[int], None] = function
            return set_mode
    return None


def _can_trace() -> bool:
    """Whether this build can trace without fusing where it has to."""
    return _set_mode() is not None or fuses()


def fuses() -> bool:
    """Whether traced operations are fused, so that low bits may differ."""
    return mx.default_device() == mx.gpu or os.environ.get(VARIABLE) == "fuse"


@contextmanager
def _unfused() -> Iterator[None]:
    """Trace without fusing on the CPU."""
    if fuses():
        yield
        return
    set_mode = _set_mode()
    assert set_mode is not None
    with _lock:  # the mode is the whole process's
        set_mode(_NO_FUSE)
        try:
            yield
        finally:
            set_mode(_ENABLED)
