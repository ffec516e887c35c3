"""Texts to train on, and the batches that they make up.

- in: token ids, and which of them count toward the loss
- out: batches of texts of similar length, in an order that depends only on the seed and the epoch,
  so that one number gives the position in the data
- it knows nothing about activations or files
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Rows of logits are padded to a multiple of a batch's positions divided by this, so that few shapes
# occur.
ROW_SHARE = 8


@dataclass(frozen=True)
class Text:
    """One text of n tokens: `tokens` (n,) int32; `counted` (n,) bool, the tokens that are targets
    of the loss, never the first; `n_bytes`, the length of the counted tokens in UTF-8 bytes."""

    tokens: np.ndarray
    counted: np.ndarray
    n_bytes: int

    def __len__(self) -> int:
        """Positions that the model reads: all but the last, from which nothing is predicted."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class Batch:
    """B texts padded at the end to T positions, with a loss at n positions.

    `which` (B,) has the texts' indices, -1 for none; `tokens` (B, T) int32, the model's input;
    `rows` (n,) int32, positions in the flattened batch; `targets` (n,) int32 and `weights` (n,)
    float32, 0 for padding; `counted`, the sum of the weights; `n_bytes`, the targets' UTF-8 bytes.
    """

    which: np.ndarray
    tokens: np.ndarray
    rows: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    counted: int
    n_bytes: int


def bucket(length: int) -> int:
    """The padded length of a text: steps of 16 up to 128, of 64 up to 512, then of 256."""
    step = 16 if length <= 128 else 64 if length <= 512 else 256
    return -(-length // step) * step


class Batches:
    """The batches of a set of texts, epoch after epoch.

    Every text comes once per epoch. The texts of a batch are in the same bucket or in neighboring
    ones; batches come in random order. No global random generator is used.
    """

    def __init__(self, texts: Sequence[Text], batch_size: int, seed: int):
        self.texts, self.batch_size, self.seed = texts, batch_size, seed
        self._drawn: tuple[int, list[np.ndarray]] = (-1, [])

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.texts) // self.batch_size)

    def __getitem__(self, position: int) -> Batch:
        """The batch at a position, counted from the start of the first epoch."""
        return self.make(self.texts_at(position))

    def texts_at(self, position: int) -> np.ndarray:
        """The texts of the batch at a position."""
        epoch, place = divmod(position, self.per_epoch)
        if self._drawn[0] != epoch:
            self._drawn = epoch, self._draw(epoch)
        return self._drawn[1][place]

    def _draw(self, epoch: int) -> list[np.ndarray]:
        random = np.random.default_rng([self.seed, epoch])
        shuffled = random.permutation(len(self.texts))
        lengths = np.array([bucket(len(self.texts[i])) for i in shuffled])
        ordered = shuffled[np.argsort(lengths, kind="stable")]
        size = self.batch_size
        cut = [ordered[i : i + size] for i in range(0, len(ordered), size)]
        return [cut[i] for i in random.permutation(len(cut))]

    def in_order(self) -> list[Batch]:
        """All batches of one epoch, always the same, for evaluation."""
        order = np.argsort([len(text) for text in self.texts], kind="stable")
        size = self.batch_size
        return [self.make(order[i : i + size]) for i in range(0, len(order), size)]

    def make(self, which: np.ndarray) -> Batch:
        """The batch of these texts, up to `batch_size` of them."""
        texts = [self.texts[i] for i in which]
        length = bucket(max(map(len, texts)))
        tokens = np.zeros((self.batch_size, length), np.int32)
        rows, targets = [], []
        for i, text in enumerate(texts):
            tokens[i, : len(text)] = text.tokens[:-1]
            places = np.flatnonzero(text.counted[1:])
            rows.append(i * length + places)
            targets.append(text.tokens[1:][places])
        counted = sum(map(len, rows))
        share = max(tokens.size // ROW_SHARE, 1)
        padding = -counted % share
        joined = np.concatenate([*rows, np.zeros(padding, np.int64)])
        return Batch(
            which=np.pad(which, (0, self.batch_size - len(which)), constant_values=-1),
            tokens=tokens,
            rows=joined.astype(np.int32),
            targets=np.concatenate([*targets, np.zeros(padding, np.int32)]).astype(np.int32),
            weights=np.repeat(np.array([1, 0], np.float32), [counted, padding]),
            counted=counted,
            n_bytes=sum(text.n_bytes for text in texts),
        )
