"""A model with random weights in a real shape, whose stages agree at a chosen rate.

Purely random weights predict noise: stages never agree, and margins mean nothing. Here the text
that the model generates is planted, and so is the margin of each token:

- every token t has a successor and a rival. Its embedding points to the head's rows of both, so
  that stage 0 prefers the successor by a margin drawn for t from the margins that poe-tiny's
  stage 0 has along its own text
- successors form one long cycle, so a text does not repeat itself. The share of the cycle in the
  first half of the ids is that of poe-tiny's text
- the blocks after stage 0 have random weights: each adds its own random change to the stream, which
  overturns a token more often the smaller its margin is. Their strength is chosen so that stage 0
  agrees with the full model at the requested rate

Compute and memory are exactly those of the real model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from cognica_mlx.bench.shapes import random_model
from cognica_mlx.cache.hidden import Hidden
from cognica_mlx.config import PoEConfig
from cognica_mlx.errors import RequestError
from cognica_mlx.network.model import PoEModel
from cognica_mlx.network.stages import Block

# The share of poe-tiny's own text (64 tokens after each of the benchmark's beginnings) with ids in
# the first half.
FREQUENT_SHARE = 0.83
# The cosine between a token's stream and its successor's row, and by how much the rival's is lower
# for each logit of poe-tiny's margin.
CERTAINTY, MARGIN_UNIT = 0.7, 0.02
HEAD_LOGIT = 16.0
FAINT = 0.05
PROBE = 384


@dataclass(frozen=True)
class Synthetic:
    """The model, the successor of every token (V,), and stage 0's agreement with the full model as
    measured on planted text."""

    model: PoEModel
    successor: np.ndarray
    agreement: float

    def text(self, length: int, start: int) -> list[int]:
        """A planted text, starting from the `start`-th token that is on the cycle."""
        cycle = np.flatnonzero(self.successor >= 0)
        token, tokens = int(cycle[start % len(cycle)]), []
        for _ in range(length):
            tokens.append(token)
            token = int(self.successor[token])
        return tokens


def check_agreement(agreement: float) -> None:
    """RequestError for an agreement that cannot be planted."""
    if not 0.5 <= agreement < 1:
        raise RequestError(f"agreement {agreement} is not between 0.5 and 1")


def synthetic_model(
    config: PoEConfig, dtype: mx.Dtype, agreement: float, margins: Sequence[float], seed: int = 0
) -> Synthetic:
    """Build a synthetic model in which stage 0 has this `agreement` with the full model; `margins`
    are poe-tiny's.

    Raises RequestError for an agreement outside 0.5 to 1, or a model with a single stage.
    """
    check_agreement(agreement)
    if config.poe_n_stages < 2:
        raise RequestError("agreement: the model has a single stage")
    model = random_model(config, dtype, seed)
    rng = np.random.default_rng(seed)
    successor, rival = _cycle(config.vocab_size, rng)
    _plant(model, successor, rival, rng.choice(np.asarray(margins), config.vocab_size))
    _calm(model)
    probe = mx.array([Synthetic(model, successor, 0.0).text(PROBE, start=17)])
    # Two rounds, because the deeper stages also react to each other's changes.
    for _ in range(2):
        strength = _strength_for(model, probe, agreement)
        for block in model.h[len(config.stage_range(0)) :]:
            _scale(block, strength)
            mx.eval(block.parameters())
    first, *_, full = model.predictions(probe)
    return Synthetic(model, successor, float(mx.mean(first.argmax(-1) == full.argmax(-1))))


def _cycle(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Each token's successor, or -1 for tokens that are not on the cycle, and a rival drawn from
    the cycle. `FREQUENT_SHARE` of the cycle's tokens are in the first half of the ids."""
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
        # Further heads add a little and decide nothing.
        extra.weight = extra.weight * mx.array(0.05 * HEAD_LOGIT / width**0.5, dtype)
        mx.eval(extra.weight)


def _calm(model: PoEModel) -> None:
    """Make the blocks' output depend on the token. The mean of the squared ReLU would favor the
    same tokens everywhere, and attention over few positions adds more than over many. Stage 0's
    blocks are made weak."""
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


def _strength_for(model: PoEModel, probe: mx.array, agreement: float) -> float:
    """The factor on the deeper stages' output with which stage 0 should have this `agreement`."""
    boundaries = model.boundaries(probe)
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
    """`hidden` with everything added since `first` multiplied by `strength`."""
    x = first.x + strength * (hidden.x - first.x)
    backout = hidden.backout
    if backout is not None:
        backout = first.x + strength * (backout - first.x)
    return Hidden(hidden.tokens, x, hidden.x0, backout)
