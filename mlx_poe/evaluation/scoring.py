"""Log-probabilities of continuations, for all predictors in one pass.

- in: texts, each a context and a continuation to score
- out: for each text, every predictor's facts about every token of the continuation
- a shared context runs once; texts run together, in one packed pass per stage, like sequences being
  decoded; nothing is padded, and only scored positions go through the heads
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from cognica_mlx.decoding.batch import Batch
from cognica_mlx.decoding.choosing import logprob_of, margin
from cognica_mlx.decoding.requests import Read, Request, Score, through
from cognica_mlx.decoding.sequence import read_prompt, ready
from cognica_mlx.decoding.state import SLACK, DecodingState
from mlx_poe.evaluation.predictors import Facts, Predictors

BATCH = 8
# Bytes that the scores of one pass may take, for all predictors together.
SCORE_BYTES = 2**28


@dataclass(frozen=True)
class Continuation:
    """Token ids, scored from `start` on. `start` is at least 1."""

    tokens: tuple[int, ...]
    start: int

    @property
    def context(self) -> tuple[int, ...]:
        """The tokens before `start`."""
        return self.tokens[: self.start]


def score(
    predictors: Predictors, texts: Sequence[Continuation], batch: int = BATCH
) -> Iterator[tuple[int, Facts]]:
    """Yield each text's index, and the facts from the predictors in `computed`, as it is done.

    `batch` contexts run at a time, longest first. Raises RequestError for a token id outside the
    vocabulary.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, text in enumerate(texts):
        groups.setdefault(text.context, []).append(i)
    longest = {key: max(len(texts[i].tokens) for i in members) for key, members in groups.items()}
    waiting = sorted(groups, key=lambda key: longest[key])
    size = len(predictors.computed) * predictors.model.config.vocab_size * 4
    rows = min(max(SCORE_BYTES // (size * batch), 1), SLACK)
    depth = predictors.target.depth
    done: list[tuple[int, list[list]]] = []

    def steps(context: Sequence[int], members: Sequence[int]) -> Generator[Request, Any, None]:
        """Run `context`, then each member's continuation on a copy of the state, by `rows`."""
        state = DecodingState(predictors.model)
        yield from ready(state, depth)
        yield from read_prompt(state, context[:-1], depth)
        for i in members:
            tokens, branch, chunks = texts[i].tokens, state.fork(), []
            for at in range(texts[i].start, len(tokens), rows):
                follow = tokens[at : at + rows]
                branch.append(list(tokens[at - 1 : at - 1 + len(follow)]))
                yield from through(branch, depth)
                scores = yield Score(branch, predictors.target, len(follow))
                chunks.append((yield Read(branch, _facts(scores, follow))))
            done.append((i, chunks))

    driver = Batch()
    try:
        while waiting or len(driver):
            while waiting and len(driver) < batch:
                context = waiting.pop()
                driver.add(context, steps(context, groups[context]))
            for event in driver.run():
                if event.error:
                    raise event.error
            while done:
                i, chunks = done.pop(0)
                whole = (np.concatenate(parts).T for parts in zip(*chunks, strict=True))
                yield i, Facts(*whole)
    finally:
        driver.close()


def _facts(scores: mx.array, follow: Sequence[int]) -> tuple[mx.array, ...]:
    """From scores (T, P, V): the log-probabilities of the tokens that follow, the best tokens, and
    their margins, (T, P) each."""
    count, predictors, size = scores.shape
    came = mx.repeat(mx.array(list(follow), dtype=mx.int32), predictors)
    logprobs = logprob_of(scores.reshape(-1, size), came).reshape(count, predictors)
    return logprobs, mx.argmax(scores, axis=-1), margin(scores)
