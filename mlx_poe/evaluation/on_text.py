"""How good each predictor is on a text: bits per byte, accuracy, agreement, weights read.

- in: predictors, token sequences, which tokens count, the byte length of every token
- out: a `Worth` for each predictor
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cognica_mlx.decoding.sampling import bits_per_byte
from cognica_mlx.errors import RequestError
from cognica_mlx.pricing.costs import Costs, bytes_read
from cognica_mlx.pricing.measuring import Progress
from cognica_mlx.pricing.replaying import replay_wand
from mlx_poe.evaluation.predictors import Facts, Predictor, Predictors
from mlx_poe.evaluation.scoring import BATCH, Continuation, score


@dataclass(frozen=True)
class Worth:
    """One predictor on a text.

    bits_per_byte: over tokens that stand for text, as nanochat defines it: special tokens count
    neither in bits nor in bytes. accuracy: the share of tokens that were the best guess. agreement:
    the share of best guesses equal to the full model's. mean_depth: how many stages were run.
    weights_read: bytes of weights per token, as a share of the full model's.
    """

    name: str
    bits_per_byte: float
    accuracy: float
    agreement: float
    mean_depth: float
    weights_read: float


@dataclass(frozen=True)
class Measured:
    """All predictors on a text; `tokens` and `bytes` count what was scored."""

    worths: list[Worth]
    tokens: int
    bytes: int


def measure_text(
    predictors: Predictors,
    texts: Sequence[Sequence[int]],
    token_bytes: Sequence[int],
    *,
    counted: Sequence[Sequence[bool]] | None = None,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> Measured:
    """Score every token but each text's first, or only those that are `counted`.

    `token_bytes` has the UTF-8 length of every token, 0 for special ones. Raises RequestError if
    nothing is left to score.
    """
    shown, costs = predictors.shown, bytes_read(predictors.model)
    lengths = np.array(token_bytes)
    marks = counted or [[True] * len(text) for text in texts]
    kept = [
        (Continuation(tuple(text), 1), np.array(mark[1:], bool))
        for text, mark in zip(texts, marks, strict=True)
        if any(mark[1:])
    ]
    if not kept:
        raise RequestError("there is nothing to score: a text needs two tokens or more")
    nats, right, same, depth, spent = (np.zeros(len(shown)) for _ in range(5))
    n_tokens = n_bytes = 0
    for done, (i, facts) in enumerate(score(predictors, [text for text, _ in kept], batch), 1):
        text, mark = kept[i]
        came = np.array(text.tokens[1:])
        sizes = lengths[came] * mark
        scored = predictors.report(facts)
        nats -= np.where(sizes > 0, scored.logprobs, 0).sum(axis=1)
        right += ((scored.best == came) & mark).sum(axis=1)
        same += (scored.agrees & mark).sum(axis=1)
        depth += (scored.depths * mark).sum(axis=1)
        spent += [_bytes(predictors, one, facts, costs) for one in shown]
        n_tokens += int(mark.sum())
        n_bytes += int(sizes.sum())
        if progress:
            progress("scoring", done, len(kept))
    positions = sum(len(text.tokens) - 1 for text, _ in kept)
    return Measured(
        [
            Worth(
                name=one.name,
                bits_per_byte=bits_per_byte(float(nats[i]), n_bytes),
                accuracy=float(right[i] / n_tokens),
                agreement=float(same[i] / n_tokens),
                mean_depth=float(depth[i] / n_tokens),
                weights_read=float(spent[i] / positions / costs.full_token),
            )
            for i, one in enumerate(shown)
        ],
        n_tokens,
        n_bytes,
    )


def _bytes(predictors: Predictors, one: Predictor, facts: Facts, costs: Costs) -> float:
    """Bytes of weights that a predictor would read to decode all positions."""
    if not one.tested:
        count = facts.best.shape[1]
        return count * (costs.lower(one.target.depth) + costs.target(one.target))
    needed = [one.exits.get(k, math.inf) for k in range(len(one.tested) - 1)]
    pools = predictors.model.pools_stages
    return replay_wand([predictors.trace(one, facts)], costs, needed, [*one.exits], pools).cost
