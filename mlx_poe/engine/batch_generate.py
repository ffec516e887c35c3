"""Many prompts at once: `batch_generate`.

- in: prompts, shared options, and options per prompt
- out: texts, responses and statistics, in the order of the prompts
- runs in the caller's thread, on a `Scheduler`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cognica_mlx.decoding.state import Progress
from cognica_mlx.errors import RequestError
from cognica_mlx.network.model import PoEModel
from cognica_mlx.network.shared_base import shared_stages
from mlx_poe.engine.scheduler import MAX_SEQUENCES, Scheduler, Stats
from mlx_poe.generation.request import GenerationRequest, Prompt, read_request
from mlx_poe.generation.responses import GenerationResponse, is_last
from mlx_poe.loading.tokenizer import Tokenizer

Finished = Callable[[int, list[GenerationResponse]], None]


@dataclass(frozen=True)
class BatchResult:
    """The result for each prompt, in order."""

    responses: list[list[GenerationResponse]]
    stats: Stats

    @property
    def texts(self) -> list[str]:
        return ["".join(r.text for r in responses) for responses in self.responses]


def batch_generate(
    model: PoEModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    per_prompt: Sequence[Mapping[str, Any] | None] | None = None,
    max_sequences: int = MAX_SEQUENCES,
    memory: int | str | None = None,
    prompt_cache_bytes: int | str | None = None,
    progress: Progress | None = None,
    finished: Finished | None = None,
    **options: Any,
) -> BatchResult:
    """Generate for many prompts together, each exactly as `stream_generate` would alone.

    Takes the options of `stream_generate` except `state` and `prompt_progress_callback`.
    `per_prompt` holds options for each prompt, which override the shared ones; a "model" in it
    replaces `model`, usually with another one over the same base. `max_sequences`, `memory` and
    `prompt_cache_bytes` are passed to `Scheduler`. `finished(index, responses)` is called as soon
    as a reply is complete, and `progress(done, total)` after it.

    Raises RequestError, naming the prompt by its index, before any work begins. An error in one
    reply is raised once all others are done. Ctrl-C ends everything; finished replies have already
    been passed to `finished`.
    """
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Sequence):
        raise RequestError(f"prompts must be a list, not {type(prompts).__name__}")
    own = [{}] * len(prompts) if per_prompt is None else [each or {} for each in per_prompt]
    if len(own) != len(prompts):
        raise RequestError(f"per_prompt has {len(own)} entries for {len(prompts)} prompts")
    requests = []
    for i, (prompt, special) in enumerate(zip(prompts, own, strict=True)):
        with _named(i):
            about = {"model": model, **options, **special}
            chosen = about.pop("model")
            if not isinstance(chosen, PoEModel):
                raise RequestError(f"model must be a loaded model, not {type(chosen).__name__}")
            requests.append(read_request(tokenizer, prompt, about).on(chosen))
    scheduler = Scheduler(
        max_sequences=max_sequences,
        memory=memory,
        prompt_cache_bytes=prompt_cache_bytes,
        keep_trunk=trunk_to_keep([request.model for request in requests]),
    )
    return run_requests(scheduler, requests, progress, finished)


@contextmanager
def _named(index: int) -> Iterator[None]:
    try:
        yield
    except RequestError as error:
        raise RequestError(f"prompt {index}: {error}") from None


def run_requests(
    scheduler: Scheduler,
    requests: Sequence[GenerationRequest],
    progress: Progress | None = None,
    finished: Finished | None = None,
) -> BatchResult:
    """Run all requests to completion. See `batch_generate` for the arguments."""
    responses: list[list[GenerationResponse]] = [[] for _ in requests]
    index = {request: i for i, request in enumerate(requests)}
    errors: list[Exception] = []
    done = 0
    try:
        for i, request in enumerate(requests):
            with _named(i):
                scheduler.add(request)
        while len(scheduler):
            for request, news in scheduler.step():
                i = index[request]
                if isinstance(news, Exception):
                    errors.append(news)
                else:
                    responses[i].append(news)
                if not is_last(news):
                    continue
                done += 1
                if finished and not isinstance(news, Exception):
                    finished(i, responses[i])
                if progress:
                    progress(done, len(requests))
        stats = scheduler.stats
    finally:
        scheduler.close()
    if errors:
        raise errors[0]
    return BatchResult(responses, stats)


def trunk_to_keep(models: Sequence[PoEModel]) -> int:
    """The `keep_trunk` for states of these models: 0 unless some of them share stages."""
    different = list({id(model): model for model in models}.values())
    first = different[0] if different else None
    if first and any(shared_stages(first, other, ()) for other in different[1:]):
        return 2 * first.config.sequence_len
    return 0
