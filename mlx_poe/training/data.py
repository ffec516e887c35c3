"""Training texts from the rows of a .jsonl file, in mlx-lm's formats.

- `{"messages": […]}`, optionally with `"tools"`; `{"prompt": …, "completion": …}`; `{"text": …}`
- a row that cannot be used is an error that names the file and line; nothing is silently skipped
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cognica_mlx.convert.chat_layout import BOS, turns
from cognica_mlx.errors import PoEError, RequestError
from cognica_mlx.training.texts import Text
from mlx_poe.tokenizer import Tokenizer
from mlx_poe.tools import with_functions


@dataclass(frozen=True)
class Split:
    """The texts of one file. `cut`: rows shortened to the limit; `emptied`: those of them that have
    no counted token left and are not among the texts."""

    texts: list[Text]
    rows: int
    cut: int
    emptied: int

    @property
    def tokens(self) -> int:
        """How many tokens there are in all."""
        return sum(len(text.tokens) for text in self.texts)

    @property
    def counted(self) -> int:
        """How many tokens the loss counts."""
        return sum(int(text.counted.sum()) for text in self.texts)


def read_split(
    path: Path,
    tokenizer: Tokenizer,
    *,
    longest: int,
    mask_prompt: bool | None = None,
    pack: bool = False,
) -> Split:
    """The texts of a file, with at most `longest` tokens each.

    `mask_prompt` and `pack` are as in `TrainingSettings`. Raises RequestError naming the file and,
    for an unusable row, the line.
    """
    lengths = np.array(tokenizer.token_byte_lengths(tokenizer.vocab_size))
    texts: list[Text] = []
    rows = cut = emptied = 0
    for number, line in _lines(path):
        try:
            tokens, counted = _encoded(_row(line), tokenizer, mask_prompt)
        except PoEError as error:
            raise RequestError(f"{path}, line {number}: {error}") from None
        rows += 1
        cut += len(tokens) > longest
        ids, marks = np.array(tokens[:longest], np.int32), np.array(counted[:longest], bool)
        if not marks.any():
            emptied += 1
            continue
        texts.append(Text(ids, marks, int(lengths[ids[marks]].sum())))
    if not rows:
        raise RequestError(f"{path} is empty: it needs one JSON object per line")
    if not texts:
        raise RequestError(
            f"{path}: cut to {longest} tokens, no row has anything left to learn from; raise "
            "--max-seq-length"
        )
    return Split(_joined(texts, longest) if pack else texts, rows, cut, emptied)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    if not path.is_file():
        raise RequestError(
            f"{path} is missing: the data folder needs train.jsonl for training and valid.jsonl "
            "for validation"
        )
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not a JSON object: {' '.join(str(error).split())[:120]}") from None
    if not isinstance(row, dict):
        raise RequestError(f"not a JSON object but {type(row).__name__}")
    return row


def _encoded(
    row: dict[str, Any], tokenizer: Tokenizer, mask_prompt: bool | None
) -> tuple[list[int], list[bool]]:
    """A row's tokens, and which of them count."""
    if "prompt" in row and "completion" in row:
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        return _chat(messages, row.get("tools"), tokenizer, mask_prompt is not False)
    if "messages" in row:
        return _chat(row["messages"], row.get("tools"), tokenizer, mask_prompt is not False)
    if "text" in row:
        if mask_prompt:
            raise RequestError("mask_prompt: a row of plain text has no prompt to mask")
        return _plain(row["text"], tokenizer)
    raise RequestError("the row has neither messages, nor prompt and completion, nor text")


def _chat(
    messages: Any, tools: Any, tokenizer: Tokenizer, mask_prompt: bool
) -> tuple[list[int], list[bool]]:
    chat = turns(messages)  # checks them
    if tools:
        chat = turns(with_functions(messages, tools))
    if not any(role == "assistant" for role, _ in chat):
        raise RequestError("there is no assistant message to learn from")
    tokens, counted = [tokenizer.token_id(BOS)], [False]
    for role, content in chat:
        turn = tokenizer.encode_turn(role, content)
        counts = role == "assistant" or not mask_prompt
        tokens += turn
        # When generating, the token that begins a turn is given.
        counted += [not mask_prompt, *[counts] * (len(turn) - 1)]
    return tokens, counted


def _plain(text: Any, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    if not isinstance(text, str) or not text.strip():
        raise RequestError("its text is empty, or not a string")
    bos = tokenizer.token_id(BOS)
    # A text ends with the next one's <|bos|>, as in the base's training data.
    tokens = [*tokenizer.encode(text), bos]
    return tokens, [False, *[True] * (len(tokens) - 1)]


def _joined(texts: Sequence[Text], longest: int) -> list[Text]:
    """Consecutive texts, joined as long as they fit into `longest` tokens."""
    groups: list[list[Text]] = [[]]
    room = longest
    for text in texts:
        if groups[-1] and len(text.tokens) > room:
            groups.append([])
            room = longest
        groups[-1].append(text)
        room -= len(text.tokens)
    return [
        Text(
            np.concatenate([text.tokens for text in group]),
            np.concatenate([text.counted for text in group]),
            sum(text.n_bytes for text in group),
        )
        for group in groups
    ]


def first_texts(texts: Sequence[Text], num_tokens: int) -> list[Text]:
    """The first texts with at most `num_tokens` in all, but at least one."""
    ends = np.cumsum([len(text.tokens) for text in texts])
    return list(texts[: max(int((ends <= num_tokens).sum()), 1)])


def fingerprint(texts: Sequence[Text], *, counted: bool) -> str:
    """A hash of the texts' tokens and, with `counted`, of which tokens count."""
    found = hashlib.blake2b(digest_size=16)
    for text in texts:
        found.update(len(text.tokens).to_bytes(8, "little"))
        found.update(text.tokens.tobytes())
        if counted:
            found.update(text.counted.tobytes())
    return found.hexdigest()
