"""What the chat tokens' embeddings start from where the base never saw them.

A base reads `<|bos|>` and plain text only; the other special tokens keep the random rows that they
were made with, and what a base makes of those is noise. They are given the embeddings of words that
stand where they do: a question's first word and its mark, a statement's first word, a line's end.
The specialists that came with poe-tiny use the same words, so the base's keys and values for a chat
are one and the same under all of them.
"""

from __future__ import annotations

import mlx.core as mx

from cognica_mlx.model import PoEModel
from cognica_mlx.training.stage import matrix
from mlx_poe.tokenizer import Tokenizer

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
# Head rows of tokens that never came are all pushed the same way; those of any two tokens that
# came are not this close.
SAME_DIRECTION = 0.98


def word_rows(base: PoEModel, tokenizer: Tokenizer, choice: str) -> dict[int, int]:
    """Which token's embedding each chat token is to have; empty where the base's own are kept.

    `choice` is "words", "keep" or "auto": words for tokens that `base` never saw, unless it is a
    specialist, whose embeddings are trained.
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
    """Those of `tokens` that the base was never to predict, by its head: their rows point the same
    way, or have stayed zero."""
    rows = matrix(base.lm_head)[mx.array(tokens)]
    lengths = mx.linalg.norm(rows, axis=-1, keepdims=True)
    unit = rows / mx.maximum(lengths, 1e-12)
    alike = unit @ unit.T - 2 * mx.eye(len(tokens))
    unseen = (alike.max(axis=-1) > SAME_DIRECTION) | (lengths[:, 0] < 1e-6)
    return frozenset(t for t, never in zip(tokens, unseen.tolist(), strict=True) if never)  # type: ignore[arg-type]
