"""The parts of a conversation that need no model: its settings and its turns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mlx_poe.generation.tools import tool_system_prompt


@dataclass(frozen=True)
class Settings:
    """How replies are made.

    `options` holds the sampling and mode options that the user has set, by name. `functions` are
    offered to the model in place of the system text, and calls must fit them. With a `schema`,
    replies are JSON that fits it. A reply ends before any of the texts in `stop`.
    """

    mode: str = "full"
    options: dict[str, Any] = field(default_factory=dict)
    system: str = ""
    max_tokens: int = 512
    specialist: str | None = None
    stop: list[str] = field(default_factory=list)
    functions: list[dict[str, Any]] = field(default_factory=list)
    schema: dict[str, Any] | None = None

    @property
    def system_text(self) -> str:
        """What the model reads before the first turn: the functions offered, or the system text."""
        return tool_system_prompt(self.functions) if self.functions else self.system

    @property
    def asked(self) -> dict[str, Any]:
        """The options of `stream_generate`. A schema comes before functions."""
        asked = {**self.options, "json_schema": self.schema}
        if self.functions and self.schema is None:
            asked["tools"] = self.functions
        return {**asked, "mode": self.mode, "max_tokens": self.max_tokens, "stop": self.stop}


@dataclass(frozen=True)
class Turn:
    """A user's message and the reply to it, with the token ids that the model wrote."""

    user: str
    reply: str = ""
    reply_tokens: list[int] = field(default_factory=list)
