"""Metrics for Prometheus.

- in: requests as they begin and end; the engine's own figures, read on demand
- out: text in Prometheus's format
"""

from __future__ import annotations

from time import monotonic
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


class Metrics:
    """Counts and times of one server."""

    def __init__(self, engine: Engine):
        self._registry = CollectorRegistry()
        for name, (text, look) in _GAUGES.items():
            gauge = Gauge(f"{_PREFIX}_{name}", text, registry=self._registry)
            gauge.set_function(lambda look=look: float(look(engine.stats)))  # type: ignore[misc]
        self.requests = self._counter(
            "requests", "Requests by how they ended", "endpoint", "outcome"
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts")
        self.cached_tokens = self._counter("cached_prompt_tokens", "Prompt tokens not run again")
        self.completion_tokens = self._counter("completion_tokens", "Tokens generated")
        self.stage_tokens = self._counter(
            "stage_tokens", "Tokens by the stage that emitted them", "stage"
        )
        self.forced_tokens = self._counter("forced_tokens", "Tokens forced by a constraint")
        self.drafts = self._counter(
            "draft_tokens", "Drafts by drafter and verdict", "drafter", "verdict"
        )
        about = "Seconds until a request's first token"
        self.first_token = Histogram(
            f"{_PREFIX}_time_to_first_token_seconds",
            about,
            buckets=_SECONDS,
            registry=self._registry,
        )
        about = "Seconds that a request took"
        self.seconds = Histogram(
            f"{_PREFIX}_request_seconds", about, buckets=_SECONDS, registry=self._registry
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", text, labels, registry=self._registry)

    def begin(self, endpoint: str) -> Record:
        """A request has arrived."""
        return Record(self, endpoint)

    def refused(self, endpoint: str, status: int) -> None:
        """A request was refused before any work."""
        outcome = "refused" if status < 500 else "error"
        self.requests.labels(endpoint, outcome).inc()

    def text(self) -> bytes:
        """All metrics."""
        return generate_latest(self._registry)


class Record:
    """One request's figures; `outcome` stays "gone" unless it is set."""

    def __init__(self, metrics: Metrics, endpoint: str):
        self._metrics, self._endpoint = metrics, endpoint
        self._began, self._waits = monotonic(), True
        self.outcome = "gone"

    def first_token(self) -> None:
        """Record the time to the first token; only the first call counts."""
        if self._waits:
            self._waits = False
            self._metrics.first_token.observe(monotonic() - self._began)

    def end(self, usage: dict[str, Any] | None) -> None:
        """The request is over; `usage` is None if it never ran."""
        metrics = self._metrics
        if usage is None:
            return
        metrics.requests.labels(self._endpoint, self.outcome).inc()
        metrics.seconds.observe(monotonic() - self._began)
        metrics.prompt_tokens.inc(usage["prompt_tokens"])
        metrics.cached_tokens.inc(usage["prompt_tokens_details"]["cached_tokens"])
        metrics.completion_tokens.inc(usage["completion_tokens"])
        ours = usage["poe"]
        for drafter, verdicts in ours["drafts"].items():
            for verdict, count in verdicts.items():
                metrics.drafts.labels(drafter, verdict).inc(count)
        metrics.forced_tokens.inc(ours["forced_tokens"])
        for stage, count in enumerate(ours["tokens_per_stage"]):
            metrics.stage_tokens.labels(str(stage)).inc(count)
