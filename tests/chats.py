"""Chats over poe-tiny and its specialists, for the tests of chats and of poe-chat."""

import sys
from types import FrameType
from typing import Any

from conftest import fixture

from mlx_poe.chat.conversation import Chat, Settings

TALK = ("What is the capital of Italy?", "Tell me about Kenya.", "Who are you?", "Thanks!")

FUNCTIONS = [
    {
        "name": "get_capital",
        "description": "Look up the capital of a country",
        "parameters": {
            "type": "object",
            "properties": {"country": {"type": "string", "description": "Country name"}},
            "required": ["country"],
        },
    }
]


def new_chat(max_tokens: int = 40, **settings: object) -> Chat:
    model, tokenizer = fixture("poe-tiny")
    chat = Chat(model, tokenizer, "poe-tiny", Settings(max_tokens=max_tokens, **settings))  # type: ignore[arg-type]
    for name in ("chat", "math", "tool"):
        chat.specialists.attach(name, f"poe-tiny-{name}")
    chat.use("chat")
    return chat


def say(chat: Chat, text: str) -> str:
    return "".join(r.text for r in chat.send(text))


class Interrupt:
    """A Ctrl-C at one point of the project's own code, where Python would deliver it.

    That is where functions, of C too, begin and end. Without a number it only counts those points.
    The end of a generator expression is none: `any` may have thrown it away before it was through,
    and what is raised there is lost.
    """

    def __init__(self, at: int = 0):
        self.at, self.events = at, 0

    def __enter__(self) -> "Interrupt":
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        name = frame.f_code.co_filename
        lost = event == "return" and frame.f_code.co_name == "<genexpr>"
        if ("/cognica_mlx/" in name or "/mlx_poe/" in name) and not lost:
            self.events += 1
            if self.events == self.at:
                sys.setprofile(None)
                raise KeyboardInterrupt
