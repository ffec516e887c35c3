"""Metrics for Prometheus.

- in: requests as they begin and end; the engine's own figures, read on demand
- out: text in Prometheus's format
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mlx_poe.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "cognica_mlx"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

# The engine's figures: name, help text, how to read it.
_GAUGES = {
    "running_sequences": ("Sequences being decoded", lambda stats: stats.running),
    "waiting_sequences": ("Sequences waiting to start", lambda stats: stats.waiting),
    "paused_sequences": ("Sequences whose reader has stalled", lambda stats: stats.paused),
    "state_bytes": ("Bytes promised to running sequences", lambda stats: stats.state_bytes),
    "rounded_copy_bytes": ("Bytes of rounded copies to draft with", lambda stats: stats.copy_bytes),
    "state_limit_bytes": ("The most bytes that may be promised", lambda stats: stats.memory_bytes),
    "prompt_cache_bytes": ("Bytes of cached prompts", lambda stats: stats.cache_bytes),
    "prompt_cache_entries": ("Cached prompts", lambda stats: stats.cache_entries),
    "prompt_cache_hits": ("Prompts with a cached beginning", lambda stats: stats.cache_hits),
    "prompt_cache_misses": ("Prompts without a cached beginning", lambda stats: stats.cache_misses),
    "active_memory_bytes": ("Bytes of all arrays", lambda stats: mx.get_active_memory()),
}


# Name, help text, labels.
_COUNTERS = {
    "requests": ("Requests by how they ended", "endpoint", "outcome"),
    "prompt_tokens": ("Tokens of prompts",),
    "cached_prompt_tokens": ("Prompt tokens not run again",),
    "completion_tokens": ("Tokens generated",),
    "stage_tokens": ("Tokens by the stage that emitted them", "stage"),
    "forced_tokens": ("Tokens forced by a constraint",),
    "draft_tokens": ("Drafts by drafter and verdict", "drafter", "verdict"),
}
_TIMES = {
    "time_to_first_token": "Seconds until a request's first token",
    "request": "Seconds that a request took",
}


class Metrics:
    """Counts and times of one server."""

    def __init__(self, engine: Engine):
        self._registry = to = CollectorRegistry()
        for name, (text, look) in _GAUGES.items():
            gauge = Gauge(f"{_PREFIX}_{name}", text, registry=to)
            gauge.set_function(lambda look=look: float(look(engine.stats)))  # type: ignore[misc]
        self._counters = {
            name: Counter(f"{_PREFIX}_{name}", text, labels, registry=to)
            for name, (text, *labels) in _COUNTERS.items()
        }
        self._times = {
            name: Histogram(f"{_PREFIX}_{name}_seconds", text, buckets=_SECONDS, registry=to)
            for name, text in _TIMES.items()
        }

    def _count(self, name: str, by: int, *labels: object) -> None:
        counter = self._counters[name]
        (counter.labels(*labels) if labels else counter).inc(by)

    def refused(self, endpoint: str, status: int) -> None:
        """A request was refused before any work."""
        self._count("requests", 1, endpoint, "refused" if status < 500 else "error")

    def first_token(self, seconds: float) -> None:
        self._times["time_to_first_token"].observe(seconds)

    def ended(self, endpoint: str, outcome: str, seconds: float, usage: dict[str, Any]) -> None:
        self._count("requests", 1, endpoint, outcome)
        self._times["request"].observe(seconds)
        self._count("prompt_tokens", usage["prompt_tokens"])
        self._count("cached_prompt_tokens", usage["prompt_tokens_details"]["cached_tokens"])
        self._count("completion_tokens", usage["completion_tokens"])
        ours = usage["poe"]
        self._count("forced_tokens", ours["forced_tokens"])
        for drafter, verdicts in ours["drafts"].items():
            for verdict, count in verdicts.items():
                self._count("draft_tokens", count, drafter, verdict)
        for stage, count in enumerate(ours["tokens_per_stage"]):
            self._count("stage_tokens", count, stage)

    def text(self) -> bytes:
        return generate_latest(self._registry)
