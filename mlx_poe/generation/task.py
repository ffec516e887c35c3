"""A prompt to run with everything that determines its reply, and what is told of it.

- in: a parsed request and the model that it is for
- out: a checked `Task` for the scheduler, which returns `Update`s of it and its own `Stats`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cognica_mlx.decoding.modes import make_mode
from cognica_mlx.decoding.rounded_prefix import RoundedPrefix
from cognica_mlx.decoding.sampling import Sampler
from cognica_mlx.decoding.sequence import DecodingSequence, Mode
from cognica_mlx.decoding.speculative import Speculative
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.costs import Costs
from cognica_mlx.pricing.pace import KnownCosts, Pace, pace_for
from mlx_poe.generation.responses import GenerationResponse, StopStrings
from mlx_poe.generation.text import Asked


@dataclass(frozen=True, eq=False)
class Task:
    """One prompt and everything that determines its reply; compared by identity."""

    model: PoEModel
    asked: Asked
    mode: Mode
    max_tokens: int
    stop: str | Sequence[str] | None = None
    step_size: int | None = None
    pace: Pace | None = None

    @property
    def tokens(self) -> Sequence[int]:
        """The prompt's tokens."""
        return self.asked.tokens

    @property
    def prefixes(self) -> set[RoundedPrefix]:
        """The rounded copy that it drafts with, if any."""
        prefix = self.mode.prefix if isinstance(self.mode, Speculative) else None
        return {prefix} if prefix else set()


def make_task(
    model: PoEModel,
    asked: Asked,
    mode: str,
    *,
    max_tokens: int,
    stop: str | Sequence[str] | None = None,
    prefill_step_size: int | None = None,
    costs: Costs | KnownCosts | None = None,
) -> Task:
    """A checked task. Raises RequestError for anything that `stream_generate` would refuse."""
    chosen = make_mode(model, mode, asked.mode_options, model.calibration)
    StopStrings(stop)
    # Checks the remaining options; it holds no memory yet.
    DecodingSequence(
        model,
        asked.tokens,
        chosen,
        max_tokens=max_tokens,
        sampler=Sampler(asked.sampling),
        prefill_step_size=prefill_step_size,
    )
    pace = pace_for(model, chosen, costs)
    return Task(model, asked, chosen, max_tokens, stop, prefill_step_size, pace)


@dataclass(frozen=True)
class Update:
    """News of a task: a response, or its end (`ended`), perhaps because of `error`."""

    task: Task
    response: GenerationResponse | None = None
    error: Exception | None = None
    ended: bool = False


@dataclass(frozen=True)
class Stats:
    """Totals and current figures. Times are in seconds, memory in bytes.

    prompt_time and generation_time: the decoding time, split in proportion to the positions run
    for prompts and replies. state_bytes: the most that running sequences may come to need; together
    with cache_bytes and copy_bytes, those of rounded copies, it never exceeds memory_bytes.
    """

    prompt_tokens: int = 0
    generation_tokens: int = 0
    prompt_time: float = 0.0
    generation_time: float = 0.0
    running: int = 0
    waiting: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    cached_tokens: int = 0
    cache_entries: int = 0
    cache_bytes: int = 0
    state_bytes: int = 0
    memory_bytes: int = 0
    paused: int = 0
    copy_bytes: int = 0
