"""The frame of both endpoints' answers, whole or as a stream of chunks.

- in: the engine's responses, by choice
- out: JSON objects; each endpoint defines what a choice looks like
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from typing import Any

from mlx_poe.generation.responses import GenerationResponse
from mlx_poe.loading.tokenizer import Tokenizer
from mlx_poe.server.choice import Choice, Piece, usage
from mlx_poe.server.shared_fields import Options


class Answer(ABC):
    """An answer under construction, with `count` choices."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, options: Options, tokenizer: Tokenizer, count: int):
        self.options, self.tokenizer = options, tokenizer
        self.choices = [Choice(tokenizer.eos_token_ids) for _ in range(count)]
        self.pieces: list[list[Piece]] = [[] for _ in range(count)]
        self._frame = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": options.served.name,
        }

    @property
    def id(self) -> str:
        """The answer's id."""
        return str(self._frame["id"])

    @property
    def usage(self) -> dict[str, Any]:
        """The usage so far."""
        return usage(self.options, self.choices)

    @abstractmethod
    def opening(self, index: int) -> list[dict[str, Any]]:
        """Choices to send before the first token."""

    @abstractmethod
    def deltas(self, index: int, piece: Piece, first: bool) -> list[dict[str, Any]]:
        """What a piece adds to a choice, as chunks' choices; `first` marks the choice's first."""

    @abstractmethod
    def choice(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        """A whole choice."""

    def add(self, index: int, response: GenerationResponse) -> None:
        """Add a choice's response to a whole answer."""
        self.pieces[index].append(self.choices[index].add(response))

    def whole(self) -> dict[str, Any]:
        """The answer, once all choices are complete."""
        choices = [self.choice(index, pieces) for index, pieces in enumerate(self.pieces)]
        return {
            **self._frame,
            "object": self.whole_object,
            "choices": choices,
            "usage": self.usage,
        }

    def first_chunks(self) -> list[dict[str, Any]]:
        """Chunks to send at once."""
        return [self._chunk(c) for i in range(len(self.choices)) for c in self.opening(i)]

    def chunks(self, index: int, response: GenerationResponse) -> list[dict[str, Any]]:
        """Add a choice's response. Returns the chunks to send for it."""
        first = self.choices[index].last is None
        piece = self.choices[index].add(response)
        return [self._chunk(choice) for choice in self.deltas(index, piece, first)]

    def last_chunks(self) -> list[dict[str, Any]]:
        """Chunks to send once all choices are complete."""
        if not self.options.include_usage:
            return []
        return [{**self._chunk(None), "choices": [], "usage": self.usage}]

    def _chunk(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        chunk = {**self._frame, "object": self.chunk_object, "choices": [choice]}
        return {**chunk, "usage": None} if self.options.include_usage else chunk
