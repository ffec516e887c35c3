"""Repeated trials, interleaved, so that changes in the machine's speed affect all cases alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from cognica_mlx.pricing.measuring import Progress


@dataclass(frozen=True)
class Samples:
    """One measurement's trials, in order."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median trial."""
        return float(np.median(self.values))

    @property
    def spread(self) -> tuple[float, float]:
        """The first and third quartiles."""
        low, high = np.percentile(self.values, (25, 75))
        return float(low), float(high)

    def each(self, change: Callable[[float], float]) -> Samples:
        """Every trial's value changed."""
        return Samples(tuple(map(change, self.values)))

    def over(self, other: Samples) -> float:
        """Median ratio of this to the other, trial by trial: what slowed both cancels out."""
        return float(np.median(np.divide(self.values, other.values)))


def interleaved(
    cases: Mapping[str, Callable[[], float]],
    trials: int,
    progress: Progress | None = None,
    label: str = "",
    before_round: Callable[[], None] = lambda: None,
) -> dict[str, Samples]:
    """Run every case once per round, for `trials` rounds after a warm-up round that is not kept.

    A case returns its measurement. The order is reversed from one round to the next;
    `before_round` is called at the beginning of each.
    """
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for trial in range(trials + 1):
        before_round()
        names = list(cases) if trial % 2 else list(cases)[::-1]
        for i, name in enumerate(names):
            value = cases[name]()
            if trial:
                taken[name].append(value)
            if progress:
                progress(label, trial * len(cases) + i + 1, (trials + 1) * len(cases))
    return {name: Samples(tuple(values)) for name, values in taken.items()}


def first_and_next(items: Iterable[object]) -> tuple[float, float]:
    """Seconds until the first item, and per item after it; there must be at least two."""
    times = [time.perf_counter()]
    times += [time.perf_counter() for _ in items]
    return times[1] - times[0], (times[-1] - times[1]) / (len(times) - 2)


@contextmanager
def host_clock() -> Iterator[Callable[[], float]]:
    """A clock of the seconds of CPU time that this thread spends outside `mx.eval` and
    `mx.async_eval`: Python, and building graphs. While the block runs, the two are wrapped."""
    kept, inside = (mx.eval, mx.async_eval), 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal inside
            started = time.thread_time()
            try:
                return function(*args)
            finally:
                inside += time.thread_time() - started

        return call

    mx.eval, mx.async_eval = map(timed, kept)
    try:
        yield lambda: time.thread_time() - inside
    finally:
        mx.eval, mx.async_eval = kept


def once_begun(
    tokens: Iterator[Hashable], sequences: int = 1, skip: int = 0
) -> tuple[float, float]:
    """Host milliseconds a token, and tokens per second, of so many sequences from when each has
    begun and they have `skip` tokens on average. `tokens` tells each token's sequence."""
    begun: set[Hashable] = set()
    made = 0
    while made < skip * sequences or len(begun) < sequences:
        begun.add(next(tokens))
        made += 1
    with host_clock() as clock:
        spent, started = clock(), time.perf_counter()
        made = sum(1 for _ in tokens)
        if not made:
            return math.nan, 0.0
        return 1e3 * (clock() - spent) / made, made / (time.perf_counter() - started)
