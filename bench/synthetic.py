"""A model of random weights in a real shape whose stages agree as often as one asks.

Random weights predict noise: stages that never agree, margins that say nothing. Here the text that
the model writes is planted, and how sure each of its tokens is:

- every token t has a successor and a rival. Its embedding points to both their rows in the head,
  so that stage 0 prefers the successor by a margin drawn for t from the margins that poe-tiny's
  stage 0 has along its own text
- successors form one long cycle, as much of it through the first half of the ids as
  poe-tiny's text has there; so a text does not repeat itself
- the blocks behind stage 0 have random weights: each adds its own random change to the stream, and
  so overturns a token the likelier, the smaller its margin. How strong they are is solved for, so
  that stage 0 agrees with the full model at the rate asked for

Compute and memory are exactly those of the real model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from cognica_mlx.bench.shapes import random_model
from cognica_mlx.config import PoEConfig
from cognica_mlx.errors import RequestError
from cognica_mlx.hidden import Hidden
from cognica_mlx.model import PoEModel
from cognica_mlx.stages import Block

# So much of poe-tiny's own text (64 tokens after each of the benchmark's beginnings) is in the
# first half of the ids.
FREQUENT_SHARE = 0.83
# The cosine between a token's stream and its successor's row; and how much of it a margin of one
# logit of poe-tiny's takes.
CERTAINTY, MARGIN_UNIT = 0.7, 0.02
HEAD_LOGIT = 16.0
FAINT = 0.05
PROBE = 384


@dataclass(frozen=True)
class Synthetic:
    """The model, the successor of every token (V,), and the agreement that stage 0 was tuned to,
    as measured on planted text."""

    model: PoEModel
    successor: np.ndarray
    agreement: float

    def text(self, length: int, start: int) -> list[int]:
        """A planted text, from the `start`-th token on that lies on the cycle."""
        cycle = np.flatnonzero(self.successor >= 0)
        token, tokens = int(cycle[start % len(cycle)]), []
        for _ in range(length):
            tokens.append(token)
            token = int(self.successor[token])
        return tokens


def synthetic_model(
    config: PoEConfig,
    dtype: mx.Dtype,
    agreement: float,
    margins: Sequence[float],
    seed: int = 0,
) -> Synthetic:
    """Build one; `agreement` is that of stage 0 with the full model, `margins` poe-tiny's.

    Raises RequestError for an agreement that no strength of the deeper stages gives, or a model
    with a single stage.
    """
    if not 0.5 <= agreement < 1:
        raise RequestError(f"agreement {agreement} is not between 0.5 and 1")
    if config.poe_n_stages < 2:
        raise RequestError("agreement: the model has a single stage")
    model = random_model(config, dtype, seed)
    rng = np.random.default_rng(seed)
    successor, rival = _cycle(config.vocab_size, rng)
    _plant(model, successor, rival, rng.choice(np.asarray(margins), config.vocab_size))
    _calm(model)
    built = Synthetic(model, successor, 0.0)
    # Two rounds: the deeper stages feel each other's changes, which the first does not foresee.
    for _ in range(2):
        strength = _strength_for(built, agreement)
        _scale_deeper(model, strength)
    return Synthetic(model, successor, _agreement(built))


def _cycle(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A successor for every token, all of them in one cycle with `FREQUENT_SHARE` of its tokens in
    the first half of the ids, or -1 for tokens outside of it; and a rival drawn alike."""
    frequent = rng.permutation(size // 2)
    count = round(len(frequent) * (1 / FREQUENT_SHARE - 1))
    rare = size // 2 + rng.permutation(size - size // 2)[:count]
    cycle = rng.permutation(np.concatenate([frequent, rare]))
    successor = np.full(size, -1)
    successor[cycle] = np.roll(cycle, -1)
    return successor, rng.choice(cycle, size)


def _plant(model: PoEModel, successor: np.ndarray, rival: np.ndarray, margins: np.ndarray) -> None:
    config, dtype = model.config, model.wte.weight.dtype
    width = config.n_embd
    # Rows of length HEAD_LOGIT / sqrt(width): a stream of unit RMS along one scores HEAD_LOGIT.
    head = model.lm_head.weight.astype(mx.float32)
    head = head * (HEAD_LOGIT / width**0.5 / mx.linalg.norm(head, axis=-1, keepdims=True))
    model.lm_head.weight = head.astype(dtype)
    gap = np.minimum(np.asarray(margins) * MARGIN_UNIT, CERTAINTY).astype(np.float32)
    first = head[mx.array(np.maximum(successor, 0))]
    second = head[mx.array(rival)]
    size = config.vocab_size
    rows = CERTAINTY * first + mx.array(CERTAINTY - gap)[:, None] * second
    model.wte.weight[:size] = (rows * (width / HEAD_LOGIT)).astype(dtype)
    mx.eval(model.parameters())
    for extra in [*model.get("lm_head_stages", []), *model.get("lm_head_specialists", [])]:
        # A second head says a little and decides nothing.
        extra.weight = extra.weight * mx.array(0.05 * HEAD_LOGIT / width**0.5, dtype)
        mx.eval(extra.weight)


def _calm(model: PoEModel) -> None:
    """Make what blocks add depend on the token before them. The mean of the squared ReLU would
    favour the same tokens everywhere, and attention over few positions adds more than over many.
    Stage 0's blocks are kept faint."""
    faint = FAINT / len(model.config.stage_range(0)) ** 0.5
    for i, block in enumerate(model.h):
        weight = block.mlp.c_proj.weight
        block.mlp.c_proj.weight = weight - weight.mean(axis=-1, keepdims=True)
        block.attn.c_proj.weight = block.attn.c_proj.weight * mx.array(FAINT, weight.dtype)
        if i in model.config.stage_range(0):
            _scale(block, faint)
        mx.eval(block.parameters())


def _scale(block: Block, factor: float) -> None:
    for linear in (block.attn.c_proj, block.mlp.c_proj):
        linear.weight = linear.weight * mx.array(factor, linear.weight.dtype)


def _scale_deeper(model: PoEModel, factor: float) -> None:
    for block in model.h[len(model.config.stage_range(0)) :]:
        _scale(block, factor)
        mx.eval(block.parameters())


def _probe(built: Synthetic) -> mx.array:
    return mx.array([built.text(PROBE, start=17)])


def _agreement(built: Synthetic) -> float:
    first, *_, full = built.model.predictions(_probe(built))
    return float(mx.mean(first.argmax(-1) == full.argmax(-1)))


def _strength_for(built: Synthetic, agreement: float) -> float:
    """The factor on what the deeper stages add by which stage 0 should agree so often."""
    model = built.model
    boundaries = model.boundaries(_probe(built))
    first = boundaries[0]
    best = model.stage_logits(0, first).argmax(-1)
    mx.eval(best)
    low, high = 0.0, 64.0
    for _ in range(16):
        middle = (low + high) / 2
        bent = {k: _bent(first, hidden, middle) for k, hidden in enumerate(boundaries)}
        rate = float(mx.mean(model.full_scores(bent).argmax(-1) == best))
        low, high = (middle, high) if rate > agreement else (low, middle)
    return (low + high) / 2


def _bent(first: Hidden, hidden: Hidden, strength: float) -> Hidden:
    """`hidden` as if all that was added since `first` had been so many times as much."""
    x = first.x + strength * (hidden.x - first.x)
    backout = hidden.backout
    if backout is not None:
        backout = first.x + strength * (backout - first.x)
    return Hidden(hidden.tokens, x, hidden.x0, backout)
