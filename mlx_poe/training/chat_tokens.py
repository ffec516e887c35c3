"""Embeddings for chat tokens that the base never saw.

A base is trained on `<|bos|>` and plain text only. The other special tokens keep their random
initial rows, which are noise to the base. They get the embeddings of words that appear in similar
places: a question's first word and its mark, a statement's first word, a line break. poe-tiny's own
specialists use the same words, so the base's keys and values for a chat are the same under all of
them.
"""

from __future__ import annotations

import mlx.core as mx

from cognica_mlx.network.model import PoEModel
from cognica_mlx.scheme import unpacked
from mlx_poe.loading.tokenizer import Tokenizer

WORDS = {
    "<|user_start|>": "What",
    "<|user_end|>": "?",
    "<|assistant_start|>": "The",
    "<|assistant_end|>": "\n",
    "<|python_start|>": "{",
    "<|python_end|>": "}",
    "<|output_start|>": "=",
    "<|output_end|>": "\n",
}
# Training pushes the head rows of all tokens that never occur in the same direction. The rows of
# tokens that do occur are never this close.
SAME_DIRECTION = 0.98


def word_rows(base: PoEModel, tokenizer: Tokenizer, choice: str) -> dict[int, int]:
    """A map from chat tokens to the tokens whose embeddings they get; empty to keep the base's own.

    `choice` is "words", "keep" or "auto": words for tokens that `base` never saw, unless it is a
    specialist, whose embeddings are already trained.
    """
    tokens = {
        tokenizer.special_tokens[name]: tokenizer.encode(word, add_special_tokens=False)[0]
        for name, word in WORDS.items()
        if name in tokenizer.special_tokens
    }
    if choice == "keep" or (choice == "auto" and base.config.specialist_layers):
        return {}
    if choice == "auto":
        unseen = never_seen(base, sorted(tokens))
        tokens = {token: word for token, word in tokens.items() if token in unseen}
    return tokens


def never_seen(base: PoEModel, tokens: list[int]) -> frozenset[int]:
    """Those of `tokens` that the base never had to predict: their rows in its head point in the
    same direction, or are still zero."""
    rows = unpacked(base.lm_head)[mx.array(tokens)]
    lengths = mx.linalg.norm(rows, axis=-1, keepdims=True)
    unit = rows / mx.maximum(lengths, 1e-12)
    alike = unit @ unit.T - 2 * mx.eye(len(tokens))
    unseen = (alike.max(axis=-1) > SAME_DIRECTION) | (lengths[:, 0] < 1e-6)
    return frozenset(t for t, never in zip(tokens, unseen.tolist(), strict=True) if never)  # type: ignore[arg-type]
