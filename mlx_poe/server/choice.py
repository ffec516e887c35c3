"""One of a request's choices as it grows: pieces of text, their tokens, and the usage.

- in: the engine's responses, one by one
- out: for each a `Piece`, with the tokens whose text is now certain; totals at the end
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_poe.generation.responses import GenerationResponse
from mlx_poe.server.shared_fields import Options


@dataclass(frozen=True)
class Piece:
    """Text, the responses with its tokens, and on the last piece the finish reason."""

    text: str
    tokens: list[GenerationResponse]
    finish_reason: str | None = None


class Choice:
    """One sequence's reply so far."""

    def __init__(self, eos_token_ids: frozenset[int]):
        self._eos = eos_token_ids
        self._held: list[GenerationResponse] = []
        self._length = 0
        self.first: GenerationResponse | None = None
        self.last: GenerationResponse | None = None
        self.forced = 0
        self.accepted: Counter[str] = Counter()
        self.stages: Counter[int] = Counter()

    def add(self, response: GenerationResponse) -> Piece:
        """The text and tokens that the next response makes certain.

        A token is returned once any of its text is. The tokens of a stop string, and the one that
        ends a reply, are never returned.
        """
        self.first, self.last = self.first or response, response
        if response.drafter:
            self.accepted[response.drafter] += 1
        self.forced += response.forced
        self.stages[response.stage] += not response.forced
        self._length += len(response.text)
        if response.token not in self._eos:
            self._held.append(response)
        count = sum(held.text_offset < self._length for held in self._held)
        tokens, self._held = self._held[:count], self._held[count:]
        return Piece(response.text, tokens, response.finish_reason)


def usage(options: Options, choices: Sequence[Choice]) -> dict[str, Any]:
    """A reply's usage: OpenAI's figures, and ours under "poe".

    Every `options.n` consecutive choices share a prompt, which counts once. A token's depth is how
    many stages were run for it; forced tokens do not count.
    """
    responses = [choice.last for choice in choices if choice.last]
    prompts = [choice.last for choice in choices[:: options.n] if choice.last]
    prompt_tokens = sum(response.prompt_tokens for response in prompts)
    stages: Counter[int] = Counter()
    completion_tokens = forced = 0
    accepted: Counter[str] = Counter()
    drafted: Counter[str] = Counter()
    if options.max_tokens != 0:
        completion_tokens = sum(response.generation_tokens for response in responses)
        accepted = sum((choice.accepted for choice in choices), accepted)
        drafted = sum((Counter(response.drafts) for response in responses), drafted)
        forced = sum(choice.forced for choice in choices)
        stages = sum((choice.stages for choice in choices), stages)
    depths = sum((stage + 1) * count for stage, count in stages.items())
    parked = next((response.parked for response in responses if response.parked), None)
    cached = sum(response.cached_tokens for response in prompts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted.total(),
            "rejected_prediction_tokens": drafted.total() - accepted.total(),
        },
        "poe": {
            "mode": options.decoding["mode"],
            "tokens_per_stage": [stages[k] for k in range(options.served.info.stages)],
            "mean_depth": depths / stages.total() if stages.total() else None,
            "forced_tokens": forced,
            "parked": parked,
            "drafts": {
                maker: {"accepted": accepted[maker], "rejected": made - accepted[maker]}
                for maker, made in drafted.items()
            },
        },
    }
