"""Compare a checkpoint and its conversion on a text, to see what quantizing changed.

- in: two models with the same stages and vocabulary, token sequences, the byte length of each token
- out: for each stage and the full model, how far the logits differ and what that costs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from cognica_mlx.decoding.choosing import logprob_of
from cognica_mlx.decoding.sampling import bits_per_byte
from cognica_mlx.errors import RequestError
from cognica_mlx.network.model import PoEModel

# Plain enough for any model, and long enough to tell 4 bits from 8.
SAMPLE = (
    "The capital of France is Paris, and the capital of Japan is Tokyo. Water freezes at zero "
    "degrees and boils at one hundred. A cat has four legs; a bird has two legs and two wings. "
    "Once upon a time there was a king who had three daughters. The eldest loved gold, the second "
    "loved music, and the youngest loved the sea. One morning a ship came into the harbour, and "
    "nobody in the town had ever seen its like. Two and three make five, and five and five make "
    "ten. The sun is a star, the earth goes around it once a year, and the moon goes around the "
    "earth. In winter the days are short and the nights are long.\n"
)


@dataclass(frozen=True)
class Difference:
    """One predictor, before and after.

    logit_difference: the largest one. agreement: the share of positions with the same best token.
    bits_per_byte: the source's and the result's.
    """

    logit_difference: float
    agreement: float
    bits_per_byte: tuple[float, float]


def compare(
    source: PoEModel, result: PoEModel, texts: Sequence[Sequence[int]], token_bytes: Sequence[int]
) -> list[Difference]:
    """The differences of each stage and, last, of the full model.

    Each text is run whole, with the logits of all stages of both models in memory. Raises
    RequestError if there is no text.
    """
    if not any(len(text) > 1 for text in texts):
        raise RequestError("the text to compare on is empty")
    count = source.poe_n_stages + 1
    furthest, same, nll = [0.0] * count, [0.0] * count, [[0.0, 0.0] for _ in range(count)]
    n_positions = n_bytes = 0
    for text in texts:
        tokens = mx.array([list(text)])
        both = zip(source.predictions(tokens), result.predictions(tokens), strict=True)
        for k, (a, b) in enumerate((a[0], b[0]) for a, b in both):
            furthest[k] = max(furthest[k], float(mx.max(mx.abs(a - b))))
            same[k] += float(mx.sum(mx.argmax(a, axis=-1) == mx.argmax(b, axis=-1)))
            for i, logits in enumerate((a, b)):
                nll[k][i] -= float(mx.sum(logprob_of(logits[:-1], tokens[0, 1:])))
        n_positions += len(text)
        n_bytes += sum(token_bytes[token] for token in text[1:])
    return [
        Difference(
            furthest[k],
            same[k] / n_positions,
            (bits_per_byte(before, n_bytes), bits_per_byte(after, n_bytes)),
        )
        for k, (before, after) in enumerate(nll)
    ]
