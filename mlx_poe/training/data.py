"""Training texts from the rows of a .jsonl file, in the formats of `mlx_poe.rows`.

- a row that cannot be used is an error that names the file and line; nothing is silently skipped
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cognica_mlx.convert.chat_layout import BOS, turns
from cognica_mlx.errors import RequestError
from cognica_mlx.training.batches import Text
from mlx_poe.loading.tokenizer import Tokenizer
from mlx_poe.rows import Text as Row
from mlx_poe.rows import named, read_rows


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
    if not path.is_file():
        raise RequestError(
            f"{path} is missing: the data folder needs train.jsonl for training and valid.jsonl "
            "for validation"
        )
    split = encoded(checked(path, mask_prompt), tokenizer, longest, mask_prompt)
    if not split.rows:
        raise RequestError(f"{path} is empty: it needs one JSON object per line")
    if not split.texts:
        raise RequestError(
            f"{path}: cut to {longest} tokens, no row has anything left to learn from; raise "
            "--max-seq-length"
        )
    return replace(split, texts=_joined(split.texts, longest)) if pack else split


def checked(path: Path, mask_prompt: bool | None) -> Iterator[Row]:
    """The rows of a file. RequestError, naming the line, for one with nothing to learn from."""
    for place, row in read_rows(path):
        with named(place):
            _check(row, mask_prompt)
        yield row


def encoded(
    rows: Iterable[Row], tokenizer: Tokenizer, longest: int, mask_prompt: bool | None
) -> Split:
    """The tokens of `checked` rows, at most `longest` of each."""
    lengths = np.array(tokenizer.token_byte_lengths(tokenizer.vocab_size))
    texts: list[Text] = []
    count = cut = emptied = 0
    for row in rows:
        count += 1
        tokens, counted = _encoded(row, tokenizer, mask_prompt)
        cut += len(tokens) > longest
        ids, marks = np.array(tokens[:longest], np.int32), np.array(counted[:longest], bool)
        if marks.any():
            texts.append(Text(ids, marks, int(lengths[ids[marks]].sum())))
        else:
            emptied += 1
    return Split(texts, count, cut, emptied)


def _check(row: Row, mask_prompt: bool | None) -> None:
    """RequestError for a row without anything to learn from."""
    if not isinstance(row, str):
        if not any(role == "assistant" for role, _ in turns(row)):
            raise RequestError("there is no assistant message to learn from")
    elif mask_prompt:
        raise RequestError("mask_prompt: a row of plain text has no prompt to mask")
    elif not row.strip():
        raise RequestError("its text is empty")


def _encoded(
    row: Row, tokenizer: Tokenizer, mask_prompt: bool | None
) -> tuple[list[int], list[bool]]:
    """A row's tokens, and which of them count."""
    bos = tokenizer.token_id(BOS)
    if isinstance(row, str):
        # A text ends with the next one's <|bos|>, as in the base's training data.
        tokens = [*tokenizer.encode(row), bos]
        return tokens, [False, *[True] * (len(tokens) - 1)]
    everything = mask_prompt is False
    tokens, counted = [bos], [False]
    for role, content in turns(row):
        turn = tokenizer.encode_turn(role, content)
        counts = role == "assistant" or everything
        tokens += turn
        # When generating, the token that begins a turn is given.
        counted += [everything, *[counts] * (len(turn) - 1)]
    return tokens, counted


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
