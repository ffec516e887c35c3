"""Choosing tokens from scores, by array operations alone.

- in: scores of rows of one or more sequences, and for each row the tokens that penalties look back
  on, a constraint's mask, the filters' numbers and random numbers
- out: chosen tokens, the best alternatives, or the distribution that a draft is drawn from
- order as in mlx-lm: bias, repetition penalty, presence and frequency penalties, mask, top-p,
  min-p, top-k, temperature
- `choose` is pure: no number of one row or token is part of its graph, which can be recorded and
  used again
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

# What rows are chosen for: a token of the text; such a token and how far its score leads; a draft
# and the distribution it is drawn from; whether drafts are accepted, and what follows them.
TOKEN, MARGIN, DRAFT, VERDICT = "token", "margin", "draft", "verdict"

# The tokens that the penalties look back on, as operands of `choose`: `recent`, the text's last
# (1, C) for the repetition penalty, and `counts` (1, V), how often each occurs in the reply.
Context = dict[str, mx.array]


@dataclass(frozen=True)
class How:
    """What `choose` does with rows; rows of sequences that agree in it are chosen from together.

    `numbers` names the columns of the operand `numbers`, which also says what is done at all: a row
    with a "temp" is drawn, others are greedy. `recent` and `biases` are those operands' widths, 0
    without; `best` is how many of the best tokens are reported.
    """

    goal: str
    numbers: tuple[str, ...]
    top_k: int
    best: int
    recent: int
    biases: int
    masked: bool

    @property
    def draws(self) -> bool:
        return "temp" in self.numbers


@dataclass(frozen=True, eq=False)
class Choice:
    """How a sequence's rows are to be chosen from: operands of `choose`, a row of each for each.
    `numbers` has the rows of that operand as numbers, to be made one array with other sequences'.
    """

    how: How
    operands: Mapping[str, mx.array]
    numbers: Sequence[Sequence[float]]


def operands(choices: Sequence[Choice]) -> dict[str, mx.array]:
    """The operands of `choose` for the rows of one or more sequences, whose choices must agree in
    `how`."""
    given = dict(choices[0].operands)
    if len(choices) > 1:
        given = {name: mx.concatenate([c.operands[name] for c in choices]) for name in given}
    if choices[0].how.numbers:
        given["numbers"] = mx.array([row for c in choices for row in c.numbers], mx.float32)
    return given


def choose_from(scores: mx.array, choices: Sequence[Choice]) -> dict[str, mx.array]:
    """`choose` for rows (n, V) of one or more sequences, whose choices must agree in `how`."""
    return choose(choices[0].how, scores, **operands(choices))


def choose(how: How, scores: mx.array, **given: mx.array) -> dict[str, mx.array]:
    """Choose from rows of scores (n, V) float32, by operands with n rows each.

    All results have n rows: `token` (n, 1) int32 and, except for a DRAFT, `logprob` (n, 1) under
    the scores after bias, penalties and mask; with `how.best` also `best` and `best_logprobs`
    (n, k), best first. A MARGIN adds `margin` (n, 1). A DRAFT adds `q` (n, V), the distribution
    that it was drawn from, unless greedy. A VERDICT adds `accepted` (n, 1), whether the row's draft
    is; then it is the token. `recent` and `counts` come back followed by the token, except from a
    VERDICT.
    """
    numbers: dict[str, mx.array] = {}
    if names := how.numbers:
        numbers = dict(zip(names, mx.split(given["numbers"], len(names), axis=1), strict=True))
    scores = _processed(how, scores, numbers, given)
    if how.draws:
        highest = mx.max(scores, axis=-1, keepdims=True)
        below = scores - highest
        relative = mx.exp(below)  # in proportion to probabilities; the best token's is 1
        total = mx.sum(relative, axis=-1, keepdims=True)
        chosen = _sampled(how, below, relative, total, numbers, given)
    else:
        chosen = {"token": mx.argmax(scores, axis=-1, keepdims=True).astype(mx.int32)}
        if how.goal == VERDICT:
            chosen["accepted"] = chosen["token"] == given["drafted"]
    token = chosen["token"]
    if how.goal != DRAFT:
        norm = highest + mx.log(total) if how.draws else mx.logsumexp(scores, -1, keepdims=True)
        chosen["logprob"] = mx.take_along_axis(scores, token, axis=-1) - norm
        if how.best:
            chosen["best"], chosen["best_logprobs"] = best_of(scores, how.best, norm)
    if how.goal == MARGIN:
        chosen["margin"] = margin(scores)[:, None]
    return chosen if how.goal == VERDICT else chosen | extended(given, token)


def extended(context: Mapping[str, mx.array], token: mx.array) -> Context:
    """A context, n rows of it, followed by a token (n, 1) each."""
    after: Context = {}
    if "recent" in context:
        after["recent"] = mx.concatenate([context["recent"][:, 1:], token], axis=1)
    if "counts" in context:
        counts = context["counts"]
        count = mx.take_along_axis(counts, token, axis=-1) + 1
        after["counts"] = mx.put_along_axis(counts, token, count, axis=-1)
    return after


def certain(token: int, vocab_size: int) -> mx.array:
    """The distribution (1, V) that allows one token only."""
    return (mx.arange(vocab_size) == token).astype(mx.float32)[None]


def _processed(
    how: How, scores: mx.array, numbers: Mapping[str, mx.array], given: Mapping[str, mx.array]
) -> mx.array:
    """Scores with bias and penalties applied, and minus infinity where a mask forbids a token."""
    if how.biases:
        at = given["biased"]
        biased = mx.take_along_axis(scores, at, axis=-1) + given["biases"]
        scores = mx.put_along_axis(scores, at, biased, axis=-1)
    if how.recent:  # Keskar et al. (2019)
        recent, penalty = given["recent"], numbers["repetition"]
        seen = mx.take_along_axis(scores, recent, axis=-1)
        seen = mx.where(seen < 0, seen * penalty, seen / penalty)
        scores = mx.put_along_axis(scores, recent, seen, axis=-1)
    if "presence" in numbers:  # as OpenAI's API defines them
        counts = given["counts"]
        scores = scores - (counts > 0) * numbers["presence"] - counts * numbers["frequency"]
    return masked(scores, given["masks"]) if how.masked else scores


def _sampled(
    how: How,
    below: mx.array,
    relative: mx.array,
    total: mx.array,
    numbers: Mapping[str, mx.array],
    given: Mapping[str, mx.array],
) -> dict[str, mx.array]:
    """What `choose` returns of a drawn token. `below` (n, V) is how far scores lie from the best,
    `relative` their exponentials, `total` (n, 1) the sum of those."""
    weights = mx.exp(below / numbers["temp"])
    if (least := _least(how, relative, total, numbers)) is not None:
        weights = mx.where(relative < least, 0, weights)
    if how.goal in (DRAFT, VERDICT):
        weights = weights / mx.sum(weights, axis=-1, keepdims=True)
    if how.goal != VERDICT:
        token = _drawn(weights, numbers["draw"])
        return {"token": token, "q": weights} if how.goal == DRAFT else {"token": token}
    # A draft x is accepted with probability min(1, p(x) / q(x)), or replaced from max(p - q, 0).
    q, drafted = given["q"], given["drafted"]
    allowed = numbers["accept"] * mx.take_along_axis(q, drafted, axis=-1)
    accepted = allowed < mx.take_along_axis(weights, drafted, axis=-1)
    accepted = accepted & (drafted >= 0)
    other = _drawn(mx.maximum(weights - q, 0), numbers["draw"])
    return {"token": mx.where(accepted, drafted, other), "accepted": accepted}


def _least(
    how: How, relative: mx.array, total: mx.array, numbers: Mapping[str, mx.array]
) -> mx.array | None:
    """The least of the relative probabilities (n, V) that the filters keep, (n, 1); None without
    filters. `total` (n, 1) is their sum. Tokens that tie at the edge are all kept."""
    size, least = relative.shape[-1], numbers.get("min_p")
    limited = 0 < how.top_k < size
    if limited:
        best = mx.topk(relative, how.top_k, axis=-1)
    if "top_p" in numbers:
        top_p = numbers["top_p"]
        if not limited:
            # All below this add up to less than 1 - top_p, so that they are never kept: made equal,
            # they are sorted much faster on a CPU.
            best = mx.maximum(relative, (1 - top_p) / size * total)
        best = mx.sort(best, axis=-1)
        above = mx.cumsum(best, axis=-1, reverse=True, inclusive=False)
        dropped = mx.sum(above >= top_p * total, axis=-1, keepdims=True)
        edge = mx.take_along_axis(best, dropped, axis=-1)
    elif limited:
        edge = mx.min(best, axis=-1, keepdims=True)
    else:
        return least
    return edge if least is None else mx.maximum(edge, least)


def _drawn(weights: mx.array, number: mx.array) -> mx.array:
    """A token (n, 1) int32 for each row of weights (n, V), with a probability in proportion to its
    own, by a random number (n, 1) in [0, 1)."""
    # Where a cumulative sum is computed in parts, it may not be flat over a weight of 0.
    mass = mx.where(weights > 0, mx.cumsum(weights, axis=-1), 0)
    wanted = number * mx.max(mass, axis=-1, keepdims=True)
    return mx.argmax(mass > wanted, axis=-1, keepdims=True).astype(mx.int32)


def best_of(scores: mx.array, count: int, norm: mx.array | None = None) -> tuple[mx.array, ...]:
    """The `count` best tokens (n, k) of each row of scores (n, V), best first, and their
    log-probabilities (n, k); empty if `count` is 0. `norm` is the rows' logsumexp (n, 1)."""
    count = min(count, scores.shape[-1])
    if not count:
        return ()
    best = mx.argpartition(-scores, kth=count - 1, axis=-1)[:, :count]
    found = mx.take_along_axis(scores, best, axis=-1)
    order = mx.argsort(-found, axis=-1)
    best, found = (mx.take_along_axis(part, order, axis=-1) for part in (best, found))
    return best, found - (mx.logsumexp(scores, -1, keepdims=True) if norm is None else norm)


def masked(scores: mx.array, masks: mx.array) -> mx.array:
    """Scores (n, V), with minus infinity where masks (n, ceil(V / 32)) uint32 have a zero bit."""
    rows, size = scores.shape
    bits = (masks[..., None] >> mx.arange(32, dtype=mx.uint32)) & 1
    return mx.where(bits.reshape(rows, -1)[:, :size], scores, -mx.inf)


def logprob_of(scores: mx.array, tokens: mx.array) -> mx.array:
    """The log-probabilities (n,) of tokens (n,) under scores (n, V)."""
    picked = mx.take_along_axis(scores, tokens[:, None], axis=-1)[:, 0]
    return picked - mx.logsumexp(scores, axis=-1)


def margin(scores: mx.array) -> mx.array:
    """How far the best score lies above the second best: (n, V) -> (n,)."""
    best = mx.argmax(scores, axis=-1, keepdims=True)
    others = mx.put_along_axis(scores, best, mx.array(-mx.inf, scores.dtype), axis=-1)
    return mx.max(scores, axis=-1) - mx.max(others, axis=-1)
