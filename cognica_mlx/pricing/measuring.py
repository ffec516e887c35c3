"""Measures a model's stages on a text: WAND's bounds, and which modes should pay.

- in: a model, token sequences, the byte length of every token
- out: a `Calibration`; nothing is written
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from cognica_mlx.calibration_file import Calibration
from cognica_mlx.decoding.choosing import logprob_of, margin
from cognica_mlx.decoding.drafters import StageDrafter
from cognica_mlx.decoding.plain import Plain
from cognica_mlx.decoding.quantized_prefix import QuantizedPrefix
from cognica_mlx.decoding.sampling import bits_per_byte
from cognica_mlx.decoding.single import decode
from cognica_mlx.decoding.targets import draft_target, full_target
from cognica_mlx.decoding.wand import exit_margins
from cognica_mlx.errors import RequestError
from cognica_mlx.files import lineage
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.costs import Costs, bytes_read, with_bytes_of
from cognica_mlx.pricing.replaying import (
    DRAFT_LENGTHS,
    Trace,
    best_options,
    recorded_prefix,
    replay_drafts,
)
from cognica_mlx.pricing.rounds import RoundCosts

CONTINUATION_PROMPT = 16
MIN_TOKENS = 100

Progress = Callable[[str, int, int], None]


def calibrate(
    model: PoEModel,
    texts: Sequence[Sequence[int]],
    token_bytes: Sequence[int],
    *,
    continuations: int = 16,
    continuation_tokens: int = 64,
    counted: Sequence[Sequence[bool]] | None = None,
    costs: Costs | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Measure `model` on token sequences, each starting as in training (BOS first).

    `token_bytes` holds the UTF-8 length of every token, 0 for special ones. Margins, agreement and
    bits per byte are measured on the texts themselves; acceptance and the modes' expected gains on
    `continuations` greedy continuations of the texts' beginnings. `counted` selects the tokens for
    bits per byte; by default all but each text's first. The expected gains, and the options that
    give them, depend on `costs`, by default the bytes of weights read.

    Raises RequestError if the text is too short to measure.
    """
    marks = (
        [np.array(m, bool) for m in counted] if counted else [np.ones(len(t), bool) for t in texts]
    )
    marks = [mark[1:] for text, mark in zip(texts, marks, strict=True) if len(text) > 1]
    texts = [text for text in texts if len(text) > 1]
    total = sum(map(len, texts))
    if total < MIN_TOKENS:
        raise RequestError(f"the text has {total} tokens; calibration needs at least {MIN_TOKENS}")
    if model.poe_n_stages < 2:
        raise RequestError("this model has a single stage: there is nothing to calibrate")
    measured = []
    for i, text in enumerate(texts):
        measured.append(_predict(model, text))
        if progress:
            progress("reading", i + 1, len(texts))
    bests, _, losses, nlls = zip(*measured, strict=True)
    best, loss = np.concatenate(bests, axis=1), np.concatenate(losses, axis=1)
    percentiles = np.maximum(np.percentile(loss, (50, 90, 99), axis=1).T, 0)
    bounds = [float(p99) for p99 in percentiles[:, 2]]
    nll = sum(one[:, mark].sum(axis=1) for one, mark in zip(nlls, marks, strict=True))
    n_bytes = sum(
        token_bytes[token]
        for text, mark in zip(texts, marks, strict=True)
        for token in np.array(text[1:])[mark]
    )
    traces = record(
        model, texts, count=continuations, tokens=continuation_tokens, progress=progress
    )
    costs = costs or bytes_read(model)
    if (prefix := recorded_prefix(model)) and not costs.rounded:
        costs = with_bytes_of(costs, prefix)
    needed = exit_margins(model, bounds, safety=1.0)
    chosen = best_options(model, traces, costs, needed)
    speedups = {
        mode: costs.full_token * replay.tokens / replay.cost for mode, (_, replay) in chosen.items()
    }
    recommended = max(speedups, key=lambda mode: speedups[mode])
    config = model.config
    return Calibration(
        stage_layers=config.stage_layers + config.specialist_layers,
        p99_bounds=tuple(round(bound, 4) for bound in bounds),
        margin_loss=tuple(tuple(round(float(p), 4) for p in row) for row in percentiles),  # type: ignore[misc]
        top1_agreement=tuple(round(float(a), 4) for a in (best == best[-1]).mean(axis=1)[:-1]),
        bits_per_byte=tuple(round(bits_per_byte(float(n), n_bytes), 4) for n in nll),
        acceptance={
            str(stage): _acceptance(model, traces, costs, stage)
            for stage in range(model.poe_n_stages - 1)
        },
        options={mode: options for mode, (options, _) in chosen.items()},
        speedups={mode: round(s, 3) for mode, s in speedups.items()},
        recommended=recommended if speedups[recommended] > 1 else "full",
        text={
            "tokens": total,
            "bytes": n_bytes,
            "continued_tokens": sum(trace.hits.shape[1] for trace in traces),
        },
        weights=lineage.record(lineage.of_model(model)),
    )


def _acceptance(model: PoEModel, traces: Sequence[Trace], costs: Costs, stage: int) -> list[float]:
    """The share of a stage's drafts that are accepted, for each of `DRAFT_LENGTHS`."""
    rounds = RoundCosts(costs, [StageDrafter(draft_target(model, stage, "summed"))])
    hits = [trace.draft_hits[stage] for trace in traces]
    return [round(replay_drafts(hits, rounds, n).acceptance, 4) for n in DRAFT_LENGTHS]


def _predict(model: PoEModel, text: Sequence[int]) -> tuple[np.ndarray, ...]:
    """The stages' predictions at T positions, for K stages; the last is the full model. best (K, T)
    token ids, margins (K, T), margin loss (K - 1, T); nll (K + 1, T - 1), in nats, of the actual
    next token, for each stage boundary and then the full model."""
    tokens = mx.array([list(text)], dtype=mx.int32)
    *logits, full = (scores[0] for scores in model.predictions(tokens))
    nll = mx.stack([-logprob_of(z[:-1], tokens[0, 1:]) for z in (*logits, full)])
    if model.pools_stages:
        logits = [model.pool(logits[: k + 1]) for k in range(len(logits))]
    scores = [*logits[:-1], full]
    best = mx.stack([mx.argmax(z, axis=-1) for z in scores])
    margins = mx.stack([margin(z) for z in scores])
    # The lead of stage k's best token one stage later: negative if it was overtaken.
    leads = mx.stack([_lead(z, best[k]) for k, z in enumerate(scores[1:])])
    mx.eval(best, margins, leads, nll)
    return tuple(map(np.array, (best, margins, margins[:-1] - leads, nll)))


def _drafts(model: PoEModel, text: Sequence[int]) -> np.ndarray:
    """The drafts of each of a specialist's stages along a text: best tokens (K, T)."""
    boundaries = dict(enumerate(model.boundaries(mx.array([list(text)], dtype=mx.int32))))
    targets = [draft_target(model, stage, "summed") for stage in boundaries]
    best = [mx.argmax(target.scores(boundaries)[0], axis=-1) for target in targets]
    return np.array(mx.stack(best))


def _copy_drafts(model: PoEModel, prefix: QuantizedPrefix, text: Sequence[int]) -> np.ndarray:
    """The copy's drafts along a text, from keys and values of its own: best tokens (T,)."""
    given = [model.embed(mx.array([list(text)], dtype=mx.int32))]
    for stage in prefix.stages:
        given.append(stage(given[stage.source]))
    hidden = {k: given[k + 1] for k in prefix.target.boundaries}
    return np.array(mx.argmax(prefix.target.scores(hidden)[0], axis=-1))


def _lead(scores: mx.array, tokens: mx.array) -> mx.array:
    """How far the scores of tokens (T,) are above all others in scores (T, V)."""
    own = mx.take_along_axis(scores, tokens[:, None], axis=-1)
    others = mx.put_along_axis(scores, tokens[:, None], mx.array(-mx.inf, scores.dtype), axis=-1)
    return own[:, 0] - mx.max(others, axis=-1)


def record(
    model: PoEModel,
    texts: Sequence[Sequence[int]],
    *,
    count: int,
    tokens: int,
    progress: Progress | None = None,
) -> list[Trace]:
    """The stages' predictions along `count` greedy continuations of the texts' beginnings, each of
    `tokens` tokens by the full model."""
    mode, traces, prefix = Plain(full_target(model)), [], recorded_prefix(model)
    for i in range(count):
        text = texts[i % len(texts)]
        # When a text is used again, it is continued from a later position.
        end = min(CONTINUATION_PROMPT * (1 + i // len(texts)), len(text))
        prompt = list(text[:end])
        decoded = decode(model, prompt, mode, max_tokens=tokens)
        written = prompt + [one.token for one in decoded]
        (best, margins, _, _), part = _predict(model, written), np.s_[:-1, end - 1 : -1]
        right = best[-1]
        hits = drafts = (best == right)[part]
        if model.config.specialist_layers:
            drafts = (_drafts(model, written) == right)[part]
        copied = (_copy_drafts(model, prefix, written) == right)[part[1:]] if prefix else None
        traces.append(Trace(hits, margins[part], drafts, copied))
        if progress:
            progress("continuing", i + 1, count)
    return traces
