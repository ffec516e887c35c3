"""The chat layout that the specialists were trained on, defined in this one place.

- `<|bos|>`, then user and assistant in turn, each turn between two special tokens of its role
- the system text has no turn of its own: it starts the first user turn, followed by a blank line
- `turns` checks a list of messages and splits it into turns; `TEMPLATE` does the same in Jinja, for
  Hugging Face's tokenizers; nothing here knows token ids
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Template

from cognica_mlx.errors import RequestError

BOS = "<|bos|>"
ROLES = ("system", "user", "assistant")
_TURNS = ("user", "assistant")
_AFTER_SYSTEM = "\n\n"


def start(role: str) -> str:
    """The special token that starts a turn of `role`."""
    return f"<|{role}_start|>"


def end(role: str) -> str:
    """The special token that ends a turn of `role`."""
    return f"<|{role}_end|>"


REPLY_START, REPLY_END = start("assistant"), end("assistant")


def with_system(system: str, text: str) -> str:
    """The first user turn with the system text in front."""
    return f"{system}{_AFTER_SYSTEM}{text}"


def turns(messages: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """A chat's turns as (role, content) pairs.

    Raises RequestError unless `messages` are at most one system message, then user and assistant
    in turn.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(f"messages are a list of dictionaries, not {type(messages).__name__}")
    pairs = [_turn(number, message) for number, message in enumerate(messages, 1)]
    has_system = bool(pairs) and pairs[0][0] == "system"
    found = pairs[has_system:]
    if not found:
        raise RequestError("the list of messages has no user message")
    for position, (role, _) in enumerate(found):
        due = _TURNS[position % 2]
        if role != due:
            raise RequestError(
                f"message {position + 1 + has_system} has the role {role} where {due} is expected:"
                " send at most one system message, then user and assistant in turn"
            )
    if has_system:
        found[0] = ("user", with_system(pairs[0][1], found[0][1]))
    return found


def _turn(number: int, message: Mapping[str, str]) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise RequestError(f"message {number} is not a dictionary but {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        shown = ascii(role)[:60] if "role" in message else "missing"
        raise RequestError(f"message {number}: its role is {shown}, not one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        shown = type(content).__name__ if "content" in message else "missing"
        raise RequestError(f"message {number}: its content is {shown}, not text")
    return role, content


# `turns` in Jinja, with the special tokens around each turn. Python's and Jinja's string literals
# look the same; `$start` and `$end` put the expected role into the token's text.
TEMPLATE = Template("""\
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else none -%}
{%- set turns = messages if system is none else messages[1:] -%}
{%- if not turns -%}{{- raise_exception("the list of messages has no user message") -}}{%- endif -%}
{%- if add_generation_prompt and turns[-1]['role'] == 'assistant' -%}
{{- raise_exception("the last message is the assistant's: end with a user message") -}}
{%- endif -%}
{%- for message in messages if message['content'] is not string -%}
{{- raise_exception("the content of a message is not text") -}}
{%- endfor -%}
{{- $bos -}}
{%- for message in turns -%}
{%- set due = $first if loop.index0 % 2 == 0 else $second -%}
{%- if message['role'] != due -%}
{{- raise_exception("a message has role " ~ message['role'] ~ " where " ~ due ~ " is expected") -}}
{%- endif -%}
{{- '$start' -}}
{%- if loop.first and system is not none -%}{{- system ~ $after_system -}}{%- endif -%}
{{- message['content'] -}}
{{- '$end' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- $reply_start -}}{%- endif -%}
""").substitute(
    bos=repr(BOS),
    first=repr(_TURNS[0]),
    second=repr(_TURNS[1]),
    start=start("' ~ due ~ '"),
    end=end("' ~ due ~ '"),
    after_system=repr(_AFTER_SYSTEM),
    reply_start=repr(REPLY_START),
)
