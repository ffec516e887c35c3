"""Whether traced steps decode as untraced ones do, and the host's time a token both ways.

- in: a model and its tokenizer
- out: a line for each mode, for a batch, and for the host's time
- in float32, traces that fuse no operations give the same log-probabilities to the last bit; fused,
  or in half precision, nearly the same
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from cognica_mlx.backend import traces
from cognica_mlx.bench.timing import interleaved, once_begun
from cognica_mlx.decoding.modes import ModeOptions, make_mode
from cognica_mlx.decoding.sequence import Mode
from cognica_mlx.decoding.single import decode
from cognica_mlx.network.model import PoEModel
from mlx_poe.doctor.agreement import APART, NEAR_TIES, PROMPTS, REPORT, TOKENS, cases
from mlx_poe.doctor.verdicts import FAILED, OK, WARNING, Line
from mlx_poe.engine.batch_generate import batch_generate
from mlx_poe.generation.responses import GenerationResponse
from mlx_poe.generation.text import stream_generate
from mlx_poe.loading.tokenizer import Tokenizer

MODES = ("full", "stage 0", "wand", "speculative")
PROMPTS_TRACED = 6
TRIALS = 5
SKIP = 8  # tokens whose host time is not counted: traces are made then
# The share of untraced decoding's host time, at full depth, above which tracing does not pay.
PAYS = 1.1

SWITCH = f"{traces.VARIABLE}=0 in the environment turns tracing off"

Replies = Sequence[Sequence[GenerationResponse]]


def same_lines(model: PoEModel, tokenizer: Tokenizer) -> Iterator[Line]:
    """Each mode and a batch of all of them, traced and untraced."""
    dtype, named = model.resid_lambdas.dtype, _modes(model)
    prompts = PROMPTS[:PROMPTS_TRACED]
    for name, options in named.items():

        def alone(options: Mapping[str, Any] = options) -> Replies:
            return [
                list(stream_generate(model, tokenizer, prompt, max_tokens=TOKENS, **options))
                for prompt in prompts
            ]

        yield compared(name, dtype, *_both_ways(alone))

    def together() -> Replies:
        order = [list(named.values())[i % len(named)] for i in range(len(prompts))]
        return batch_generate(
            model, tokenizer, list(prompts), max_tokens=TOKENS, per_prompt=order
        ).responses

    yield compared(f"a batch of {len(prompts)}", dtype, *_both_ways(together))


def _modes(model: PoEModel) -> dict[str, dict[str, Any]]:
    return {name: options for name, options in cases(model).items() if name in MODES}


def _both_ways(decoding: Callable[[], Replies]) -> tuple[Replies, Replies]:
    """What it gives traced, and untraced."""
    traced = decoding()
    with traces.off():
        return traced, decoding()


def compared(name: str, dtype: mx.Dtype, traced: Replies, untraced: Replies) -> Line:
    """Whether tokens and their stages are the same, and how far log-probabilities are apart as long
    as they are."""
    apart, parted = 0.0, 0
    for one, other in zip(traced, untraced, strict=True):
        parted += [(r.token, r.stage) for r in one] != [(r.token, r.stage) for r in other]
        for a, b in zip(one, other, strict=False):
            if a.token != b.token:
                break
            apart = max(apart, np.nan_to_num(abs(a.logprob - b.logprob), nan=np.inf))
    value = f"{len(traced) - parted} of {len(traced)} replies are the same traced and untraced, "
    value += f"log-probabilities differ by {apart:.2g} at most" if apart else "to the last bit"
    status, advice = OK, ""
    if apart > APART[dtype] or (parted and dtype == mx.float32):
        status, advice = FAILED, f"{REPORT}; {SWITCH}"
    elif parted:
        status, advice = WARNING, NEAR_TIES
    elif apart and dtype == mx.float32 and not traces.fuses():
        status, advice = WARNING, "the same bits on any machine that we have tested: please tell us"
    numbers = {"replies": len(traced), "parted": parted, "apart": float(apart)}
    return Line("tracing", name, status, value, advice, numbers)


def host_line(model: PoEModel, tokenizer: Tokenizer) -> Line:
    """The host's time a token in each mode, traced and untraced, in the same trials."""
    if not traces.enabled():
        advice = f"unset {traces.VARIABLE}, unless something goes wrong with tracing"
        return Line("tracing", "host time", WARNING, f"{traces.VARIABLE} turns tracing off", advice)
    text = tokenizer.encode(PROMPTS[0])
    runs: dict[str, Callable[[], float]] = {}
    for name, options in _modes(model).items():
        own = {k: v for k, v in options.items() if k != "mode"}
        mode = make_mode(model, options.get("mode", "full"), ModeOptions(**own), model.calibration)
        run = partial(_host, model, text, mode)
        runs |= {name: run, f"{name}, untraced": partial(_untraced, run)}
    taken = interleaved(runs, TRIALS)
    numbers, parts = {}, []
    for name in _modes(model):
        spent, untraced = taken[name], taken[f"{name}, untraced"]
        numbers[name] = ratio = spent.over(untraced)
        parts.append(f"{name} {spent.median:.2g} of {untraced.median:.2g} ms ({ratio:.2f})")
    status, advice = OK, ""
    if numbers["full"] > PAYS:
        status, advice = WARNING, f"tracing does not pay here: {SWITCH}"
    value = "a token takes, traced and untraced, " + ", ".join(parts)
    return Line("tracing", "host time", status, value, advice, numbers)


def _host(model: PoEModel, text: Sequence[int], mode: Mode) -> float:
    tokens = decode(model, text, mode, max_tokens=SKIP + TOKENS)
    return once_begun((0 for _ in tokens), skip=SKIP)[0]


def _untraced(run: Callable[[], float]) -> float:
    with traces.off():
        return run()
