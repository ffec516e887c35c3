"""Which rank holds what: parsed from a flag, or balanced by how fast the ranks are.

- stages go to ranks in order, starting with rank 0, so activations only ever move to higher ranks
- rank 0 also holds the embedding and the heads: a prediction is V numbers a position, activations
  are only 3 D, so activations travel and predictions are made on rank 0
- a specialist on its own rank has its heads there: a head weighs as much as several of its layers,
  and reading the heads in parallel is half of the gain
"""

from __future__ import annotations

import re
import time
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import mlx.core as mx
import mlx.nn as nn

from cognica_mlx.config import PoEConfig
from cognica_mlx.errors import RequestError
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.costs import bytes_read

_NAME = re.compile(r"(h|lm_head_specialists)\.(\d+)\.|(wte|lm_head|lm_head_stages)\.")
# Rows of the matrix product that compares the speed of ranks, and how often it is timed.
ROWS, TRIALS = 8, 16


class Absent(nn.Module):
    """A placeholder for a module that another rank holds."""


@dataclass(frozen=True)
class Part:
    """The part of a model that a rank holds. Every rank also has the lambdas and gates, which are
    small."""

    layers: frozenset[int]
    embedding: bool
    shared_heads: bool
    specialist_heads: frozenset[int]

    def holds(self, name: str) -> bool:
        """Whether the parameter called `name` belongs to it."""
        if not (match := _NAME.match(name)):
            return True
        if match[3]:
            return self.embedding if match[3] == "wte" else self.shared_heads
        held = self.layers if match[1] == "h" else self.specialist_heads
        return int(match[2]) in held

    def strip(self, model: PoEModel) -> None:
        """Remove the modules that do not belong to it from a model that has no weights yet."""
        for name in ("h", "lm_head_stages", "lm_head_specialists"):
            if name in model:
                parts = enumerate(model[name])
                model[name] = [p if self.holds(f"{name}.{i}.") else Absent() for i, p in parts]
        for name in ("wte", "lm_head"):
            if not self.holds(f"{name}."):
                model[name] = Absent()


# This rank's part of a specialist that another rank holds.
NOTHING = Part(frozenset(), False, False, frozenset())


@dataclass(frozen=True)
class Split:
    """The rank of each stage: the base's, then one for each specialist in the order in which they
    are attached."""

    ranks: tuple[int, ...]

    def stages(self, rank: int) -> list[int]:
        """The stages that a rank owns."""
        return [stage for stage, owner in enumerate(self.ranks) if owner == rank]

    def part(self, config: PoEConfig, rank: int, *, speaks: bool = False) -> Part:
        """The part of a base of this configuration that a rank holds; with `speaks` it includes the
        base's head, which the rank's own specialists need."""
        own = [k for k in self.stages(rank) if k < config.poe_n_stages]
        layers = frozenset(i for k in own for i in config.stage_range(k))
        heads = range(len(config.specialist_layers)) if not rank else ()
        return Part(layers, not rank, not rank or speaks, frozenset(heads))


def parse(text: str, size: int, base: int, specialists: Sequence[str] = ()) -> Split:
    """The split that a flag like `0|1,2,3` asks for: the stages of rank 0, of rank 1 and so on.

    Raises RequestError unless it fits `size` ranks and a model of `base` stages and `specialists`.
    """
    try:
        groups = [[int(stage) for stage in part.split(",")] for part in text.split("|")]
    except ValueError:
        raise RequestError(f"--split {text}: write it as 0|1,2,3, or the word stages") from None
    total = base + len(specialists)
    if [stage for group in groups for stage in group] != list(range(total)):
        named = f"0 to {total - 1}" + (", specialists last" if specialists else "")
        raise RequestError(f"--split {text}: give each of the stages {named} once, in order")
    if len(groups) != size:
        raise RequestError(
            f"--split {text} is for {len(groups)} machines, but {size} have been started"
        )
    return Split(tuple(rank for rank, group in enumerate(groups) for _ in group))


def balanced(config: PoEConfig, seconds: Sequence[float], specialists: Sequence[str] = ()) -> Split:
    """A split by the `seconds` that each rank needs for the same work.

    Each specialist gets its own rank while there are ranks left, the other specialists stay on
    rank 0. Without specialists the stages are divided so that the slowest rank takes least time for
    a token: by the bytes that its stages read, and on rank 0 the heads. RequestError if there are
    more ranks than stages.
    """
    size, stages = len(seconds), config.poe_n_stages
    if size > stages + len(specialists):
        raise RequestError(
            f"{size} machines have been started for {stages + len(specialists)} stages: "
            "start at most one for each"
        )
    if specialists:
        others = min(len(specialists), size - 1)
        here = len(specialists) - others
        if size - 1 > others:
            raise RequestError(
                f"{size} machines have been started for a base and {len(specialists)} "
                "specialists: start at most one for each, or give --split"
            )
        return Split((*[0] * (stages + here), *range(1, others + 1)))
    costs = bytes_read(PoEModel(config))  # a model without weights

    def times(split: Split) -> list[float]:
        """What a token takes on each rank, the slowest first."""
        found = []
        for rank in range(size):
            layers = sum(map(costs.stage, split.stages(rank)))
            found.append(seconds[rank] * (layers + (0 if rank else costs.full_head())))
        return sorted(found, reverse=True)

    return min((Split(ranks) for ranks in _runs(stages, size)), key=times)


def _runs(stages: int, size: int) -> Iterator[tuple[int, ...]]:
    """All ways to give `size` ranks runs of the stages in order, none of them empty."""
    for cuts in combinations(range(1, stages), size - 1):
        yield tuple(bisect(cuts, stage) for stage in range(stages))


def seconds_here(config: PoEConfig, dtype: mx.Dtype) -> float:
    """Seconds that a layer's largest matrix product takes on this machine."""
    weight = mx.zeros((config.intermediate_size, config.n_embd), dtype)
    x = mx.zeros((ROWS, config.n_embd), dtype)
    mx.eval(weight, x)
    times = []
    for _ in range(TRIALS):
        started = time.perf_counter()
        mx.eval(x @ weight.T)
        times.append(time.perf_counter() - started)
    return min(times)
