"""Whether decoding on this machine agrees with plain forwards on it: rows, modes, batches.

- in: a model and its tokenizer
- out: a line for each check
- a token is right if no other token has a higher score when the whole text is run at once; in half
  precision the best two may be so close that passes of different sizes rank them differently
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from cognica_mlx.bench.sections.drafts import BEGINNINGS
from cognica_mlx.calibration_file import published_bounds
from cognica_mlx.decoding.passes import score
from cognica_mlx.decoding.requests import Score
from cognica_mlx.decoding.single import advance_through, prefill
from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.decoding.targets import full_target
from cognica_mlx.network.model import PoEModel, log_op
from mlx_poe.doctor.verdicts import FAILED, OK, WARNING, Line
from mlx_poe.engine.batch_generate import batch_generate
from mlx_poe.generation.responses import GenerationResponse
from mlx_poe.generation.text import stream_generate
from mlx_poe.loading.tokenizer import Tokenizer
from mlx_poe.loading.verify import SAMPLE

# How far logits from passes of different sizes may differ, by the type of the weights.
APART = {mx.float32: 1e-3, mx.float16: 0.05, mx.bfloat16: 0.4}
MOST_ROWS = 16
CONTEXTS = 6
TOKENS = 24
# The share of WAND's tokens that should be the full model's. The bounds promise more, on text like
# the calibration's.
WAND_AGREES, WAND_FAILS = 0.97, 0.9

PROMPTS = (
    *BEGINNINGS,
    "The capital of Japan is",
    "Tom has 12 apples.",
    "The sun is a star",
    "A cat has four legs",
    "In winter the days are short",
    "The king had three daughters.",
    "7 + 8 =",
    "Two and three make",
    "The ship came into the harbour",
    "Water freezes at",
    "People in Italy speak",
)

Replies = Mapping[str, Sequence[GenerationResponse]]

REPORT = "please report this: something computes wrong results here"
NEAR_TIES = "rounding decides between nearly equal tokens here; use --dtype float32 to avoid that"


@dataclass(frozen=True)
class Verdict:
    """About replies: the number of tokens, how many are not the best by a plain forward, how far
    the worst of these is from the best, in logits, and how many are the full model's best."""

    tokens: int
    wrong: int
    furthest: float
    as_full: int

    def status(self, dtype: mx.Dtype) -> str:
        """OK if every token is right, WARNING if the wrong ones are near ties, otherwise FAILED."""
        if not self.wrong:
            return OK
        return WARNING if self.furthest <= APART[dtype] else FAILED


def rows(model: PoEModel, tokenizer: Tokenizer) -> Line:
    """Passes of 2 to 16 rows against single rows."""
    dtype, target = model.resid_lambdas.dtype, full_target(model)
    text = tokenizer.encode(SAMPLE)
    apart, flips, count = 0.0, 0, 0
    ends = np.linspace(len(text) // 8, len(text) - MOST_ROWS, CONTEXTS).astype(int).tolist()
    for end in ends:
        state = DecodingState(model)
        prefill(state, text[:end], target.depth)

        def scores(tokens: Sequence[int], state: DecodingState = state) -> np.ndarray:
            state.append(tokens)
            advance_through(state, target.depth)
            found = score([Score(state, target, len(tokens))])[0]
            state.next_round()
            return np.array(found)

        alone = np.concatenate([scores([token]) for token in text[end : end + MOST_ROWS]])
        for n in range(2, MOST_ROWS + 1):
            state.rollback(end)
            together = scores(text[end : end + n])
            # NaN counts as infinitely far apart.
            apart = max(apart, np.nan_to_num(np.abs(together - alone[:n]), nan=np.inf).max())
            flips += int((together.argmax(-1) != alone[:n].argmax(-1)).sum())
            count += n
    value = f"logits differ by {apart:.2g} at most; {flips} of {count} greedy tokens flip"
    numbers = {"apart": float(apart), "flips": flips, "tokens": count}
    status, advice = OK, ""
    if apart > APART[dtype]:
        status, advice = FAILED, REPORT
    elif flips:
        status = WARNING
        advice = (
            "speculation may choose differently between nearly equal tokens; use --dtype float32 "
            "if output must not depend on the mode"
        )
    name = f"2 to {MOST_ROWS} rows against single rows"
    return Line("rows", name, status, value, advice, numbers)


def cases(model: PoEModel) -> dict[str, dict[str, Any]]:
    """Every mode that the model supports: options of `stream_generate`, by name."""
    last = model.poe_n_stages - 1
    found: dict[str, dict[str, Any]] = {
        "full": {},
        "stage 0": {"mode": "stage", "stage": 0},
        "prefix of 2": {"mode": "prefix", "max_stages": min(2, last + 1)},
        "compose": {"mode": "compose"},
        "speculative": {"mode": "speculative"},
    }
    if last and (model.calibration or published_bounds(model.config)):
        found["wand"] = {"mode": "wand"}
    return found


def replies(model: PoEModel, tokenizer: Tokenizer, options: Mapping[str, Any]) -> Replies:
    """The model's reply to each prompt, one at a time."""
    return {
        prompt: list(stream_generate(model, tokenizer, prompt, max_tokens=TOKENS, **options))
        for prompt in PROMPTS
    }


def judged(
    model: PoEModel, tokenizer: Tokenizer, options: Mapping[str, Any], made: Replies
) -> Verdict:
    """Compare replies with a plain forward of each text."""
    count = wrong = as_full = 0
    furthest = 0.0
    for prompt, reply in made.items():
        ids, tokens = tokenizer.encode(prompt), [r.token for r in reply]
        part = np.s_[len(ids) - 1 :]
        predictions = [z[0, part] for z in model.predictions(mx.array([[*ids, *tokens[:-1]]]))]
        short = _short_of_best(model, predictions, options, reply)
        count += len(tokens)
        # NaN is wrong too.
        wrong += int((~(short <= 0)).sum())
        furthest = max(furthest, *np.where(np.isnan(short), np.inf, short).tolist())
        as_full += int((np.array(predictions[-1]).argmax(-1) == tokens).sum())
    return Verdict(count, wrong, furthest, as_full)


def _short_of_best(
    model: PoEModel,
    predictions: Sequence[mx.array],
    options: Mapping[str, Any],
    reply: Sequence[GenerationResponse],
) -> np.ndarray:
    """How far each token's score is below the best one, under the mode's rule."""
    *stages, full = predictions
    mode, at = options.get("mode", "full"), np.arange(len(reply))
    tokens = np.array([r.token for r in reply])

    def below(scores: mx.array) -> np.ndarray:
        numbers = np.array(scores)
        return numbers.max(axis=-1) - numbers[at, tokens]

    if mode in ("full", "speculative"):
        return below(full)
    if mode == "stage":
        return below(stages[options["stage"]])
    if mode == "compose":
        return below(log_op(stages, [1 / len(stages)] * len(stages)))
    by_stage = [
        model.pool(stages[: k + 1]) if model.pools_stages else z for k, z in enumerate(stages)
    ]
    if mode == "prefix":
        return below(by_stage[options["max_stages"] - 1])
    # WAND's tokens must be those of the stage where they exited, with the margin required there by
    # the rule in `decoding.wand`.
    calibration = model.calibration
    bounds = calibration.p99_bounds if calibration else published_bounds(model.config) or ()
    safety = calibration.options.get("wand", {}).get("safety", 1.0) if calibration else 1.0
    short = []
    for k, z in enumerate(by_stage[:-1]):
        second, best = np.sort(np.array(z), axis=-1)[:, -2:].T
        short.append(np.fmax(below(z), safety * sum(bounds[k:]) - (best - second)))
    return np.stack([*short, below(full)])[[r.stage for r in reply], at]


def modes(model: PoEModel, tokenizer: Tokenizer) -> Iterator[Line]:
    """Check every mode on the prompts, and a batch of all modes against the same prompts alone."""
    dtype, alone = model.resid_lambdas.dtype, {}
    for name, options in cases(model).items():
        alone[name] = replies(model, tokenizer, options)
        yield _mode_line(name, dtype, judged(model, tokenizer, options, alone[name]))
    if "wand" not in alone:
        advice = "make a calibration with mlx_poe.calibrate"
        yield Line("modes", "wand", WARNING, "not checked", advice)
    yield _batch(model, tokenizer, alone)


def _mode_line(name: str, dtype: mx.Dtype, verdict: Verdict) -> Line:
    share = verdict.as_full / verdict.tokens
    status, advice = verdict.status(dtype), ""
    right = verdict.tokens - verdict.wrong
    value = f"{right} of {verdict.tokens} tokens agree with a plain forward"
    if verdict.wrong:
        value += f", the others within {verdict.furthest:.2g} of the best"
        advice = REPORT if status == FAILED else NEAR_TIES
    if name != "full":
        value += f"; {share:.1%} are the full model's choice"
    if name == "wand" and share < WAND_AGREES and status != FAILED:
        status = FAILED if share < WAND_FAILS else WARNING
        advice = REPORT if status == FAILED else "calibrate on text like yours: mlx_poe.calibrate"
    numbers = {"tokens": verdict.tokens, "wrong": verdict.wrong, "furthest": verdict.furthest}
    return Line("modes", name, status, value, advice, {**numbers, "agreement": share})


def _batch(model: PoEModel, tokenizer: Tokenizer, alone: Mapping[str, Replies]) -> Line:
    """The prompts together, cycling through all modes."""
    dtype, named = model.resid_lambdas.dtype, cases(model)
    order = [list(named)[i % len(named)] for i in range(len(PROMPTS))]
    options = [named[name] for name in order]
    together = batch_generate(
        model, tokenizer, list(PROMPTS), max_tokens=TOKENS, per_prompt=options
    ).responses
    found = [
        judged(model, tokenizer, named[name], {**alone[name], prompt: reply}).status(dtype)
        for name, prompt, reply in zip(order, PROMPTS, together, strict=True)
        if [r.token for r in reply] != [r.token for r in alone[name][prompt]]
    ]
    parted = len(found)
    value = f"{len(PROMPTS) - parted} of {len(PROMPTS)} replies are the same"
    status, advice = OK, ""
    if parted:
        status = FAILED if FAILED in found or dtype == mx.float32 else WARNING
        advice = REPORT if status == FAILED else NEAR_TIES
    numbers = {"replies": len(PROMPTS), "parted": parted}
    return Line("batch", "all modes together against alone", status, value, advice, numbers)
