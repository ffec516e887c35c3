"""Chats over poe-tiny and its specialists, for the tests of chats and of poe-chat."""

from conftest import fixture

from mlx_poe.chat import Chat, Settings

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


def new_chat(**settings: object) -> Chat:
    model, tokenizer = fixture("poe-tiny")
    chat = Chat(model, tokenizer, "poe-tiny", Settings(max_tokens=40, **settings))  # type: ignore[arg-type]
    for name in ("chat", "math", "tool"):
        chat.specialists.attach(name, f"poe-tiny-{name}")
    chat.use("chat")
    return chat


def say(chat: Chat, text: str) -> str:
    return "".join(r.text for r in chat.send(text))
