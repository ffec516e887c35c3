"""The frame of both endpoints' responses, whole or as a stream of chunks.

- in: the engine's responses, by choice
- out: JSON objects, chunks as events, and the usage; each endpoint defines what a choice looks like
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from mlx_poe.generation.responses import GenerationResponse, drafts_by_maker
from mlx_poe.loading.tokenizer import Tokenizer
from mlx_poe.server.shared_fields import Options
from mlx_poe.server.wire import event, to_json


class Choice:
    """One sequence's reply so far: its responses, and the `tokens` that are part of its text.

    A token counts once any of its text is certain. The tokens of a stop string, and the one that
    ends a reply, never do.
    """

    def __init__(self, eos_token_ids: frozenset[int]):
        self._eos = eos_token_ids
        self._held: list[GenerationResponse] = []
        self._length = 0
        self.responses: list[GenerationResponse] = []
        self.tokens: list[GenerationResponse] = []

    def add(self, response: GenerationResponse) -> list[GenerationResponse]:
        """Add the next response. Returns the tokens that it makes certain."""
        self.responses.append(response)
        self._length += len(response.text)
        if response.token not in self._eos:
            self._held.append(response)
        count = sum(held.text_offset < self._length for held in self._held)
        certain, self._held = self._held[:count], self._held[count:]
        self.tokens += certain
        return certain

    @property
    def text(self) -> str:
        return "".join(response.text for response in self.responses)


class ResponseFrame(ABC):
    """A response under construction. `tokens` are those of each prompt, once they are read."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, options: Options, tokenizer: Tokenizer):
        self.options, self.tokenizer = options, tokenizer
        count = options.n * len(options.prompts)
        self.choices = [Choice(tokenizer.eos_token_ids) for _ in range(count)]
        self.tokens: list[Sequence[int]] = []
        self._frame = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": options.served.name,
        }

    @property
    def id(self) -> str:
        return str(self._frame["id"])

    @property
    def usage(self) -> dict[str, Any]:
        return usage(self.options, self.choices)

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Choices to send before the first token."""
        return []

    @abstractmethod
    def deltas(
        self, index: int, response: GenerationResponse, tokens: list[GenerationResponse]
    ) -> list[dict[str, Any]]:
        """What a response, and the tokens that it makes certain, add to a choice, as chunks'
        choices."""

    @abstractmethod
    def choice(self, index: int) -> dict[str, Any]:
        """A whole choice."""

    def whole(self) -> dict[str, Any]:
        """The response, once all choices are complete."""
        choices = [self.choice(index) for index in range(len(self.choices))]
        return {**self._frame, "object": self.whole_object, "choices": choices, "usage": self.usage}

    def first_chunks(self) -> list[bytes]:
        """Chunks to send at once."""
        return [self._chunk(c) for i in range(len(self.choices)) for c in self.opening(i)]

    def chunks(self, index: int, response: GenerationResponse) -> list[bytes]:
        """Add a choice's response. Returns the chunks to send for it."""
        tokens = self.choices[index].add(response)
        return [self._chunk(choice) for choice in self.deltas(index, response, tokens)]

    def last_chunks(self) -> list[bytes]:
        """Chunks to send once all choices are complete."""
        if not self.options.include_usage:
            return []
        chunk = {**self._frame, "object": self.chunk_object, "choices": [], "usage": self.usage}
        return [event(chunk)]

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        before, after = self._around
        return before + to_json(choice) + after

    @cached_property
    def _around(self) -> tuple[bytes, bytes]:
        """What comes before and after the choice in a chunk's event, which is the same in all."""
        chunk = {**self._frame, "object": self.chunk_object, "choices": []}
        whole = event({**chunk, "usage": None} if self.options.include_usage else chunk)
        before, _, after = whole.rpartition(b"[]")
        return before + b"[", b"]" + after


def usage(options: Options, choices: Sequence[Choice]) -> dict[str, Any]:
    """A response's usage: OpenAI's figures, and ours under "poe".

    Every `options.n` consecutive choices share a prompt, which counts once. A token's depth is how
    many stages were run for it; forced tokens do not count.
    """
    last = [choice.responses[-1] for choice in choices if choice.responses]
    prompts = [choice.responses[-1] for choice in choices[:: options.n] if choice.responses]
    prompt_tokens = sum(response.prompt_tokens for response in prompts)
    replies = [] if options.max_tokens == 0 else [choice.responses for choice in choices]
    completion_tokens = sum(map(len, replies))
    forced = sum(response.forced for reply in replies for response in reply)
    stages = Counter(r.stage for reply in replies for r in reply if not r.forced)
    accepted: Counter[str] = Counter()
    drafted: Counter[str] = Counter()
    for reply in replies:
        for maker, (kept, made) in drafts_by_maker(reply).items():
            accepted[maker] += kept
            drafted[maker] += made
    depths = sum((stage + 1) * count for stage, count in stages.items())
    fell_back = next((response.fell_back for response in last if response.fell_back), None)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(r.cached_tokens for r in prompts)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted.total(),
            "rejected_prediction_tokens": drafted.total() - accepted.total(),
        },
        "poe": {
            "mode": options.decoding.get("mode", "full"),
            "tokens_per_stage": [stages[k] for k in range(options.served.info.stages)],
            "mean_depth": depths / stages.total() if stages.total() else None,
            "forced_tokens": forced,
            "fell_back": fell_back,
            "parked": fell_back,  # as version 0.2 called it
            "drafts": {
                maker: {"accepted": accepted[maker], "rejected": made - accepted[maker]}
                for maker, made in drafted.items()
            },
        },
    }
