"""Texts to measure on: read from a file and cut into token sequences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cognica_mlx.errors import RequestError
from mlx_poe.loading.tokenizer import Tokenizer
from mlx_poe.rows import Text, file_name, read_rows
from mlx_poe.training.data import checked, encoded, first_texts

SEGMENT_TOKENS = 512


def read_texts(file: Path, mask_prompt: bool = False) -> list[Text]:
    """The texts and chats in a file, - for stdin; with `mask_prompt`, chats with replies only.

    Raises RequestError for a file without text, and for an invalid line.
    """
    texts = list(checked(file, True)) if mask_prompt else [text for _, text in read_rows(file)]
    if not any(texts):
        raise RequestError(f"{file_name(file)} contains no text")
    return texts


def segments(
    data: Sequence[Text], tokenizer: Tokenizer, num_tokens: int, longest: int = SEGMENT_TOKENS
) -> list[list[int]]:
    """Token sequences of up to `longest` tokens, each starting with BOS; `num_tokens` in all."""
    cut: list[list[int]] = []
    room = num_tokens
    for item in data:
        if isinstance(item, str):
            tokens = tokenizer.encode(item)
        else:
            answered = item[-1].get("role") == "assistant"
            tokens = tokenizer.apply_chat_template(item, add_generation_prompt=not answered)
        bos, body = tokens[:1], tokens[1:]
        for start in range(0, len(body), longest - 1):
            if room <= 1:
                return cut
            cut.append((bos + body[start : start + longest - 1])[:room])
            room -= len(cut[-1])
    return cut


def replies(
    data: Sequence[Text], tokenizer: Tokenizer, num_tokens: int, longest: int = SEGMENT_TOKENS
) -> tuple[list[list[int]], list[list[bool]]]:
    """Whole chats, and which of their tokens the assistant says. RequestError if there are none
    within `longest` tokens."""
    chats = encoded(data, tokenizer, longest, mask_prompt=True)
    if not chats.texts:
        raise RequestError(f"no reply begins within the first {longest} tokens of its chat")
    chosen = first_texts(chats.texts, num_tokens)
    return [text.tokens.tolist() for text in chosen], [text.counted.tolist() for text in chosen]
