"""Texts to measure on: read from a file and cut into token sequences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cognica_mlx.errors import RequestError
from mlx_poe.commands.entry import read_stdin
from mlx_poe.tokenizer import Tokenizer
from mlx_poe.training.data import first_texts, read_split

SEGMENT_TOKENS = 512

# A text, or the messages of a chat.
Text = str | list[dict[str, str]]


def read_texts(file: Path) -> list[Text]:
    """The texts and chats in a file, - for stdin.

    Raises RequestError for a file without text, and for an invalid line.
    """
    if str(file) == "-":
        items: list[Text] = [read_stdin()]
    else:
        text = file.read_text(encoding="utf-8", errors="replace")
        items = _entries(file, text) if file.suffix == ".jsonl" else [text]
    if not any(items):
        raise RequestError(f"{'stdin' if str(file) == '-' else file} contains no text")
    return items


def _entries(file: Path, text: str) -> list[Text]:
    items: list[Text] = []
    # Not splitlines: JSON strings may contain other line separators.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            items.append(_chat(entry["messages"]) if "messages" in entry else str(entry["text"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise RequestError(
                f"{file}, line {number}: expected a JSON object with text or messages"
            ) from None
    return items


def _chat(messages: object) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise TypeError("messages must be a list of objects")
    return messages


def segments(
    data: Sequence[Text], tokenizer: Tokenizer, num_tokens: int, longest: int = SEGMENT_TOKENS
) -> list[list[int]]:
    """Token sequences of up to `longest` tokens, each starting with BOS; `num_tokens` in all."""
    cut: list[list[int]] = []
    for item in data:
        if isinstance(item, str):
            tokens = tokenizer.encode(item)
        else:
            answered = item[-1:] and item[-1].get("role") == "assistant"
            tokens = tokenizer.apply_chat_template(item, add_generation_prompt=not answered)
        bos, body = tokens[:1], tokens[1:]
        for start in range(0, len(body), longest - 1):
            cut.append(bos + body[start : start + longest - 1])
    kept: list[list[int]] = []
    for segment in cut:
        room = num_tokens - sum(map(len, kept))
        if room <= 1:
            break
        kept.append(segment[:room])
    return kept


def replies(
    file: Path, tokenizer: Tokenizer, num_tokens: int, longest: int = SEGMENT_TOKENS
) -> tuple[list[list[int]], list[list[bool]]]:
    """Whole chats, and which of their tokens the assistant says."""
    chats = read_split(file, tokenizer, longest=longest, mask_prompt=True)
    chosen = first_texts(chats.texts, num_tokens)
    return [text.tokens.tolist() for text in chosen], [text.counted.tolist() for text in chosen]
