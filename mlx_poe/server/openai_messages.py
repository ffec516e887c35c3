"""Convert a chat's history from OpenAI's format to the turns that the models were trained on.

- in: `messages`, including developer and tool messages, content parts and calls
- out: optionally one system message, then alternating user and assistant messages in plain text
- consecutive messages of the same side become one turn, with a blank line between them
"""

from __future__ import annotations

import json

from cognica_mlx.convert.chat_layout import turns
from cognica_mlx.errors import RequestError
from mlx_poe.generation.tools import call_text, result_text
from mlx_poe.server.error_bodies import refused
from mlx_poe.server.fields import Fields, shown

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "tool": "user",
    "assistant": "assistant",
}
# Fields of a reply that clients send back, and a speaker's name, which the models' layout lacks.
_IGNORED = ("name", "refusal", "annotations", "token_stages")


def read_messages(body: Fields) -> list[dict[str, str]]:
    """The chat. ApiError naming the message for an invalid one."""
    found: list[dict[str, str]] = []
    calls: set[str] = set()
    body.required("messages", body.items)
    for message in body.objects("messages"):
        role = message.required("role", message.text)
        if role not in ROLES:
            raise refused(message.name("role"), f"{shown(role)} is not one of {', '.join(ROLES)}")
        text = _read(message, role, calls)
        message.ignore(_IGNORED)
        message.done()
        if found and found[-1]["role"] == ROLES[role]:
            found[-1]["content"] += f"\n\n{text}"
        else:
            found.append({"role": ROLES[role], "content": text})
        if found[-1]["role"] == "system" and len(found) > 1:
            raise refused(message.name("role"), f"a {role} message after the first turn")
    try:
        turns(found)
    except RequestError as error:
        raise refused("messages", str(error)) from None
    if found[-1]["role"] == "assistant":
        raise refused(
            "messages", "the last one is the assistant's: end with a user or tool message"
        )
    return found


def _read(message: Fields, role: str, calls: set[str]) -> str:
    """The text of a message. `calls` collects the ids of calls so far."""
    if role == "tool":
        answered = message.required("tool_call_id", message.text)
        if answered not in calls:
            raise refused(message.name("tool_call_id"), "no earlier call has this id")
        return result_text(message.required("content", lambda field: _content(message, field)))
    if role != "assistant":
        return message.required("content", lambda field: _content(message, field))
    text, made = _content(message, "content"), []
    for call in message.objects("tool_calls"):
        calls.add(call.required("id", call.text))
        call.only("type", "function")
        call.ignore(["index"])
        function = call.required("function", call.object)
        name = function.required("name", function.text)
        made.append(call_text(name, _laid_out(function.required("arguments", function.text))))
        function.done()
        call.done()
    if text is None and not made:
        raise refused(message.name("content"), "this field is required")
    return " ".join(part for part in (text, *made) if part)


def _laid_out(arguments: str) -> str:
    """Arguments in the layout that the model writes; unchanged if they are not JSON."""
    try:
        return json.dumps(json.loads(arguments), ensure_ascii=False)
    except (ValueError, RecursionError):
        return arguments


def _content(message: Fields, field: str) -> str | None:
    """The content's text: a string, or text parts joined."""
    if not isinstance(message.take(field), list):
        return message.text(field)
    texts = []
    for part in message.objects(field):
        part.only("type", "text")
        texts.append(part.required("text", part.text))
        part.done()
    return "".join(texts)
