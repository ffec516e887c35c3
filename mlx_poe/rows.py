"""Files of text and of JSON lines, read the same way by every command.

- UTF-8, with or without a byte order mark; anything else is refused, with the remedy
- a text keeps its line ends, so that its bytes are the file's
- a file holds rows if its name ends in one of `ROWS`; a name without an ending, such as a pipe's,
  says nothing, so then the first line decides
- a row is in one of mlx-lm's formats: `{"messages": […]}`, optionally with `"tools"`;
  `{"prompt": …, "completion": …}`; `{"text": …}`
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from cognica_mlx.convert.chat_layout import turns
from cognica_mlx.errors import PoEError, RequestError, one_line
from cognica_mlx.files.git_lfs import pointer_problem
from mlx_poe.generation.tools import with_functions

# Endings of files with one JSON object on each line.
ROWS = (".jsonl", ".ndjson", ".jsonlines", ".json")
FORMATS = ("messages", "prompt", "text")
STDIN = Path("-")

# A text, or the messages of a chat.
Text = str | list[Mapping[str, str]]

_MARK = b"\xef\xbb\xbf"
# How files begin that are not text, and what makes text of them.
_OTHERS = {
    b"\x1f\x8b": ("compressed", "gunzip -c"),
    b"BZh": ("compressed", "bunzip2 -c"),
    b"\xfd7zXZ": ("compressed", "xz -dc"),
    b"\x28\xb5\x2f\xfd": ("compressed", "zstd -dc"),
    b"PK\x03\x04": ("a zip archive", "unzip -p"),
    b"\xff\xfe": ("UTF-16", "iconv -f utf-16 -t utf-8"),
    b"\xfe\xff": ("UTF-16", "iconv -f utf-16 -t utf-8"),
}


def file_name(file: Path) -> str:
    """A file's name in messages; - is stdin."""
    return "stdin" if file == STDIN else str(file)


def read_text(file: Path) -> str:
    """A file's text; - is stdin. RequestError if it cannot be read, or is not UTF-8."""
    with _opened(file) as stream:
        data = stream.read()
    return _decoded(file, data, data[:8])


def json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """The values in a file of JSON lines, with their line numbers; - is stdin.

    Blank lines count but are left out. Raises RequestError, naming the line.
    """
    yield from _values(file, _lines(file))


def read_rows(file: Path) -> Iterator[tuple[str, Text]]:
    """The texts and chats of a file, each with its place in words; - is stdin.

    Raises RequestError, naming the line, for a row in none of the formats.
    """
    ending = file.suffix.lower()
    if ending in ROWS:
        values = json_lines(file)
    else:
        text = read_text(file)
        if ending or not _begins_with_row(text):
            yield file_name(file), text
            return
        values = _values(file, enumerate(text.split("\n"), 1))
    for number, value in values:
        place = f"{file_name(file)}, line {number}"
        with named(place):
            row = _row(value)
        yield place, row


@contextmanager
def named(place: str) -> Iterator[None]:
    """Add a row's place to errors raised inside."""
    try:
        yield
    except PoEError as error:
        raise RequestError(f"{place}: {error}") from None


def _row(row: Any) -> Text:
    """The text of a row, or its messages; functions that it offers are in the system text."""
    if not isinstance(row, dict):
        raise RequestError(f"not a JSON object but {type(row).__name__}")
    tools = row.get("tools")
    if "prompt" in row and "completion" in row:
        messages: Any = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    elif "messages" in row:
        messages = row["messages"]
    elif "text" not in row:
        raise RequestError("the row has neither messages, nor prompt and completion, nor text")
    elif not isinstance(row["text"], str):
        raise RequestError(f"its text is {json.dumps(row['text'])[:40]}, not a string")
    elif tools:
        raise RequestError("a text cannot offer tools: they need messages")
    else:
        return row["text"]
    turns(messages)  # checks them
    return with_functions(messages, tools) if tools else messages


def _begins_with_row(text: str) -> bool:
    first = text.lstrip().split("\n", 1)[0]
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and any(name in row for name in FORMATS)


def _values(file: Path, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Any]]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            hint = " (name it .txt to read it as text)" if file.suffix.lower() == ".json" else ""
            raise RequestError(
                f"{file_name(file)}, line {number}: not a JSON object: {one_line(error)}{hint}"
            ) from None
        yield number, value


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    # Only "\n" ends a line: JSON strings may contain other separators.
    at, begins = 0, b""
    with _opened(file) as stream:
        for number, line in enumerate(stream, 1):
            begins = begins or line[:8]
            yield number, _decoded(file, line, begins, at, number)
            at += len(line)


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    if file != STDIN and (problem := pointer_problem(file)):
        raise RequestError(f"{file} {problem}")
    try:
        with nullcontext(sys.stdin.buffer) if file == STDIN else file.open("rb") as stream:
            yield stream
    except OSError as error:
        raise RequestError(f"{file_name(file)} cannot be read: {error.strerror or error}") from None


def _decoded(file: Path, data: bytes, begins: bytes, at: int = 0, line: int = 1) -> str:
    """Bytes as text. They start `at` the given byte and line; the file starts with `begins`."""
    mark = len(_MARK) if not at and data.startswith(_MARK) else 0
    try:
        text = data[mark:].decode("utf-8")
        wrong = data.find(b"\0")
    except UnicodeDecodeError as error:
        text, wrong = "", mark + error.start
    if wrong < 0:
        return text
    kind, remedy = "", "iconv -f latin1 -t utf-8, if it is Latin-1"
    if b"\0" in begins:
        order = "be" if begins.startswith(b"\0") else "le"
        remedy = f"iconv -f utf-16{order} -t utf-8, if it is UTF-16"
    for start, (other, tool) in _OTHERS.items():
        if begins.startswith(start):
            kind, remedy = f" (the file is {other})", tool
    line += data.count(b"\n", 0, wrong)
    raise RequestError(
        f"{file_name(file)}, line {line}: not UTF-8 text at position {at + wrong}{kind}; "
        f"convert it with {remedy}"
    )
