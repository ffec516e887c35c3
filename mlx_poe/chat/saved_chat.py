"""Conversations in files: JSON that a person can read and edit.

- in: a path, or a chat to save
- out: a chat with every field checked, or a CheckpointError
- messages have OpenAI's shape, with a function's call and its result as such; a reply's token ids
  are beside it, of use only as long as they decode to its text
- the caller checks whether settings and token ids fit a model

A saved chat may come from anywhere, so it is trusted no more than a checkpoint. Before version 0.3
it was a safetensors file: its header has the text, and its arrays, a decoding state, are not read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from safetensors import SafetensorError, safe_open

from cognica_mlx.convert.chat_layout import turns as check_turns
from cognica_mlx.decoding.modes import MODES
from cognica_mlx.errors import CheckpointError, PoEError, RequestError, one_line
from cognica_mlx.files import strict_json
from cognica_mlx.files.whole_file import replacing
from mlx_poe.chat.turns import Settings, Turn
from mlx_poe.generation.request import SAMPLING
from mlx_poe.generation.tools import ToolCallParser, call_text, read_functions, result_text
from mlx_poe.rows import read_text

_FORMAT = "cognica-mlx chat 3"
_OLD_FORMATS = ("cognica-mlx chat 1", "cognica-mlx chat 2")
_SETTINGS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("mode", "system"), (str,)),
    **dict.fromkeys(("stop", "functions"), (list,)),
    "options": (dict,),
    "max_tokens": (int,),
    "specialist": (str, NoneType),
    "schema": (dict, NoneType),
}


@dataclass(frozen=True)
class SavedChat:
    """The content of a file. `revisions` are the hub commits of the model and of the specialist in
    use. `notes` say what the file holds that is not used."""

    model: str
    revisions: Sequence[str | None]
    settings: Settings
    turns: list[Turn]
    notes: list[str] = field(default_factory=list)


def write_chat(path: Path, chat: SavedChat) -> None:
    """Write `chat` to `path`, whole or not at all, readable for the user alone. CheckpointError if
    that fails."""
    settings = asdict(chat.settings)
    content = {
        "format": _FORMAT,
        "model": chat.model,
        "revisions": dict(zip(("model", "specialist"), chat.revisions, strict=True)),
        "messages": list(_messages(settings.pop("system"), chat.turns)),
        "settings": settings,
    }
    text = strict_json.dumps(content, ensure_ascii=False, indent=2)
    # Lists of numbers on one line. No string has a line break in it, so no text changes.
    text = re.sub(r"\[\n[\d\s,]*\]", lambda ids: f"[{' '.join(ids[0][1:-1].split())}]", text)
    try:
        with replacing(path, private=True) as temporary:
            # Half a surrogate pair, which UTF-8 lacks, becomes its escape in JSON.
            temporary.write_bytes(text.encode("utf-8", "backslashreplace") + b"\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from None


def _messages(system: str, turns: Sequence[Turn]) -> Iterator[dict[str, Any]]:
    if system:
        yield {"role": "system", "content": system}
    call_id = ""
    for number, turn in enumerate(turns, 1):
        result = turn.user.removeprefix(result_text(""))
        if call_id and result != turn.user:
            yield {"role": "tool", "tool_call_id": call_id, "content": result}
        else:
            yield {"role": "user", "content": turn.user}
        reply = _assistant(turn.reply, f"call_{number}")
        yield {**reply, "token_ids": turn.reply_tokens}
        call_id = f"call_{number}" if "tool_calls" in reply else ""


def _assistant(reply: str, call_id: str) -> dict[str, Any]:
    """A reply as a message; with the call in it, if reading that gives the same text."""
    parser = ToolCallParser()
    before = parser.feed(reply)
    if parser.call:
        call = parser.call.message(call_id)
        message = {"role": "assistant", "content": before.rstrip() or None, "tool_calls": [call]}
        if _plain(message)["content"] == reply:
            return message
    return {"role": "assistant", "content": reply}


def _plain(message: Any) -> Any:
    """A message with its calls, or a call's result, as the text that the model reads."""
    if not isinstance(message, Mapping):
        return message  # `check_turns` refuses it
    role, content = message.get("role"), message.get("content")
    if role == "tool" and isinstance(content, str):
        return {"role": "user", "content": result_text(content)}
    if role == "assistant" and (calls := message.get("tool_calls")):
        try:
            made = [call["function"] for call in calls]
            texts = [call_text(each["name"], each["arguments"]) for each in made]
        except (TypeError, KeyError):
            raise ValueError("a message has tool_calls that are not in OpenAI's shape") from None
        content = " ".join([content, *texts] if content else texts)
    return {"role": role, "content": content}


def read_chat(path: Path) -> SavedChat:
    """Read a file written by `write_chat`. CheckpointError for anything else."""
    content, notes = _content(path), []
    try:
        settings, unknown = _settings(content.get("settings", {}))
        messages = content.get("messages")
        if content.get("format") in _OLD_FORMATS:
            messages = _old_messages(content["turns"])
            notes = [f"{path} is of an older version: the decoding state in it is not used"]
        elif content.get("format") != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT!r}")
        system, turns = _turns(messages)
    except (PoEError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path} is a damaged chat: {one_line(error)}") from None
    if unknown:
        notes.append(f"{path} has settings that are ignored: {', '.join(unknown):.200}")
    named = content.get("revisions") or ()
    listed = named.values() if isinstance(named, dict) else named
    revisions = [one for one in listed if isinstance(one, str)]
    model = str(content.get("model", ""))
    return SavedChat(model, revisions, Settings(**{**settings, **system}), turns, notes)


def _content(path: Path) -> dict[str, Any]:
    """The JSON object that a file is, or has in its header."""
    if not path.is_file():
        missing = "is not a regular file" if path.exists() else "is missing"
        raise CheckpointError(f"{path} {missing}")
    text = ""
    try:
        with suppress(SafetensorError), safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get("chat", "")
        content = json.loads(text or read_text(path))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
    except RequestError as error:
        raise CheckpointError(str(error)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a saved chat: {one_line(error)}") from None
    return content


def _old_messages(turns: Any) -> list[dict[str, Any]]:
    """The turns of version 0.2 as messages."""
    return [
        message
        for turn in turns
        for message in (
            {"role": "user", "content": turn["user"]},
            {"role": "assistant", "content": turn["reply"], "token_ids": turn["reply_tokens"]},
        )
    ]


def _settings(content: Any) -> tuple[dict[str, Any], list[str]]:
    """The settings that this version has, with the right types, and the names of the others."""
    if not isinstance(content, dict):
        raise ValueError("its settings are not an object")
    known = {name: value for name, value in content.items() if name in _SETTINGS}
    for name, value in known.items():
        if type(value) not in _SETTINGS[name]:
            raise ValueError(f"its setting {name} cannot be {value!r:.40}")
    mode, options = known.get("mode", "full"), known.get("options", {})
    unknown = [name for name in content if name not in _SETTINGS]
    if mode not in MODES:
        unknown.append(f"mode {known.pop('mode')}")
    usable = {*SAMPLING, *MODES.get(mode, ())}
    unknown += [name for name in options if name not in usable]
    known["options"] = {name: value for name, value in options.items() if name in usable}
    if known.get("functions"):
        known["functions"] = read_functions(known["functions"])
    return known, unknown


def _turns(messages: Any) -> tuple[dict[str, str], list[Turn]]:
    """The system text as a setting, if there is one, and the turns of a chat's messages."""
    if not isinstance(messages, list):
        raise ValueError("its messages are not a list")
    plain = [_plain(message) for message in messages]
    if plain and isinstance(plain[-1], dict) and plain[-1]["role"] == "user":
        raise ValueError("its last message has no reply: add one, or delete the message")
    check_turns([*plain, {"role": "user", "content": ""}])  # a chat that can go on
    system = {}
    if plain and plain[0]["role"] == "system":
        system, messages, plain = {"system": plain[0]["content"]}, messages[1:], plain[1:]
    return system, [
        Turn(user["content"], reply["content"], _ids(message.get("token_ids")))
        for user, reply, message in zip(plain[::2], plain[1::2], messages[1::2], strict=True)
    ]


def _ids(value: Any) -> list[int]:
    """Token ids, or none if they are not numbers: the reply is encoded again."""
    whole = isinstance(value, list) and all(type(token) is int for token in value)
    return value if whole else []
