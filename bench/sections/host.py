"""What the host spends on a token, how fast tokens come after the prompt, and when the first one
of a process comes: each against mlx-lm, or against the plain case, in the same trials.

- in: a setup, and the name of its model, which a fresh process loads for its first token
- out: figures with a ratio, what it is to, and the goal
- host time is the thread's CPU time outside `mx.eval` and `mx.async_eval`: Python, and building
  graphs. It is measured on random weights at 1.3B's depth with narrow layers, whatever the model
- a round of speculation drafts 3 tokens and verifies them. Nearly all drafts of a random model are
  rejected, so a round is a token. WAND's bounds are such that tokens run 1.7 of the 4 stages
- tokens per second are the model's, against mlx-lm's engine over the same weights, which is what
  it runs on the converted folder. Prompts are not counted, nor are the first tokens
- goals are for poe-tiny on the CPU with OpenBLAS; at 1.3B's shape a single sequence's is 1.05x
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator, generate_step

from cognica_mlx.backend import traces
from cognica_mlx.bench.peers import DRAFTS, peer_model
from cognica_mlx.bench.sections.batch_speeds import prompts, tokens_of
from cognica_mlx.bench.sections.stage_speeds import Figure, Setup, figure
from cognica_mlx.bench.shapes import random_model
from cognica_mlx.bench.timing import Samples, once_begun
from cognica_mlx.config import PoEConfig
from cognica_mlx.decoding.batch import Batch
from cognica_mlx.decoding.modes import ModeOptions, make_mode
from cognica_mlx.decoding.sampling import Sampler, SamplingOptions
from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.decoding.single import drive
from cognica_mlx.errors import RequestError
from cognica_mlx.files.stored import dtype_name
from cognica_mlx.network.mlx_lm_model import Model
from cognica_mlx.network.model import PoEModel

# 1.3B's depth, stages and windows, with narrow layers.
SHAPE: dict[str, Any] = {
    **{"n_layer": 24, "poe_every": 6, "n_head": 2, "n_embd": 128, "head_dim": 64},
    **{"vocab_size": 2048, "sequence_len": 2048, "window_pattern": "SSSL"},
}
TOGETHER = 16
# Of the prompts that host time is measured after.
LENGTHS = [100 - 5 * i for i in range(TOGETHER)]
# By the number of sequences, the goal for tokens per second.
COUNTS = {1: 1.1, 4: 1.1, TOGETHER: 1.4, 32: 1.2}
# A sequence's first tokens are not counted.
SKIP = 8
GREEDY = SamplingOptions()
SAMPLINGS = {
    "temperature and top-p": SamplingOptions(temp=0.8, top_p=0.9),
    "repetition penalty": SamplingOptions(repetition_penalty=1.1),
}
PEER = "mlx-lm"


@dataclass(frozen=True)
class Case:
    """Decoding `sequences` at once: `run` yields a sequence's number for each of its tokens.
    `against` is the case that it is compared with. The ratio of host times should be `goal` at
    most, that of tokens per second `goal` at least."""

    run: Callable[[], Iterator[Hashable]]
    sequences: int = 1
    against: str = ""
    goal: float = 0.0


def host(setup: Setup, name: str | None) -> list[Figure]:
    """All figures of the section. `name` is the model's, None if it has random weights."""
    found = [*_host_times(setup), *_rates(setup)]
    return [*found, *_first_tokens(setup, name)] if name else found


def ours(
    model: PoEModel,
    texts: Sequence[Sequence[int]],
    limits: Sequence[int],
    sampling: SamplingOptions = GREEDY,
    mode: str = "full",
    **options: Any,
) -> Iterator[Hashable]:
    """We continue `texts` by `limits` tokens: one as `decode` does, several in a batch."""
    sequences = [
        DecodingSequence(
            model,
            text,
            make_mode(model, mode, ModeOptions(**options), model.calibration),
            max_tokens=limit,
            sampler=Sampler(replace(sampling, seed=i)),
        )
        for i, (text, limit) in enumerate(zip(texts, limits, strict=True))
    ]
    if len(sequences) == 1:
        for _ in drive(sequences[0].steps()):
            yield 0
        return
    batch = Batch()
    for i, sequence in enumerate(sequences):
        batch.add(i, sequence.steps())
    yield from tokens_of(batch)


def theirs(
    model: nn.Module, texts: Sequence[Sequence[int]], limits: Sequence[int]
) -> Iterator[Hashable]:
    """mlx-lm continues them: one by its `generate_step`, several by its `BatchGenerator`."""
    if len(texts) == 1:
        for _ in generate_step(mx.array([*texts[0]]), model, max_tokens=limits[0]):
            yield 0
        return
    generator = BatchGenerator(
        model, completion_batch_size=len(texts), prefill_batch_size=len(texts)
    )
    generator.insert([list(text) for text in texts], list(limits))
    while made := generator.next_generated():
        yield from (response.uid for response in made)
    generator.close()


def _measured(case: Case) -> tuple[float, float]:
    return once_begun(case.run(), case.sequences, SKIP)


def _host_times(setup: Setup) -> list[Figure]:
    config = PoEConfig.from_dict(SHAPE)
    model = random_model(config, mx.float32)
    peer = peer_model(config, config.n_layer, mx.float32)
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, config.vocab_size, n).tolist() for n in LENGTHS]
    limits = [SKIP + setup.tokens] * len(texts)
    alone, batch = (texts[:1], limits[:1]), (texts, limits)

    def one(mode: str, goal: float, **options: Any) -> Case:
        run = partial(ours, model, *alone, mode=mode, **options)
        return Case(run, against=f"{PEER}, one sequence", goal=goal)

    drafting = {"draft_stage": 0, "num_draft_tokens": DRAFTS}
    many = f"batch of {TOGETHER}"
    cases = {
        f"{PEER}, one sequence": Case(partial(theirs, peer, *alone)),
        "full": one("full", 0.5),
        "stage 0": one("stage", 0.16, stage=0),
        "wand": one("wand", 0.4, p99_bounds=[0.05] * (model.poe_n_stages - 1)),
        f"a round of {DRAFTS} drafts": one("speculative", 1.2, **drafting),
        f"{PEER}, {many}": Case(partial(theirs, peer, *batch), TOGETHER),
        f"full, {many}": Case(partial(ours, model, *batch), TOGETHER, f"{PEER}, {many}", 0.45),
    }
    for label, sampling in SAMPLINGS.items():
        for name, given in (("full", alone), (f"full, {many}", batch)):
            run = partial(ours, model, *given, sampling)
            cases[f"{name}, {label}"] = Case(run, len(given[0]), name, 1.2)
    runs = {name: partial(lambda case: _measured(case)[0], case) for name, case in cases.items()}
    taken = setup.interleaved(runs, "host time")
    return _figures("host ms/token", taken, cases)


def _rates(setup: Setup) -> list[Figure]:
    peer = Model(setup.model.config)
    peer.update_modules(setup.model.leaf_modules())  # they may be quantized
    peer.update(setup.model.parameters())
    peer.eval()
    cases = {}
    for count, goal in COUNTS.items():
        name = f"{count} sequence{'s' * (count > 1)}"
        # From all tokens down to half of them, so that they end at different times.
        limits = [SKIP + setup.tokens - i * setup.tokens // (2 * count) for i in range(count)]
        given = (prompts(setup, count), limits)
        cases[f"{PEER}, {name}"] = Case(partial(theirs, peer, *given), count)
        cases[name] = Case(partial(ours, setup.model, *given), count, f"{PEER}, {name}", goal)
        if count == TOGETHER:
            for label, sampling in SAMPLINGS.items():
                run = partial(ours, setup.model, *given, sampling)
                cases[f"{name}, {label}"] = Case(run, count, name, 0.85)
    runs = {name: partial(lambda case: _measured(case)[1], case) for name, case in cases.items()}
    taken = setup.interleaved(runs, "decoding")
    return _figures("tokens/s", taken, cases)


def _figures(unit: str, taken: Mapping[str, Samples], cases: Mapping[str, Case]) -> list[Figure]:
    return [_figure(name, unit, taken, one.against, one.goal) for name, one in cases.items()]


def _figure(
    name: str, unit: str, taken: Mapping[str, Samples], against: str = "", goal: float = 0.0
) -> Figure:
    notes: dict[str, float | str] = {}
    if against:
        sign = ">=" if unit == "tokens/s" else "<="
        ratio = taken[name].over(taken[against])
        notes = {"ratio": ratio, "goal": f"{sign} {goal:.2f}x", "against": against}
    return figure("host", name, unit, taken[name], notes=notes)


# Prints the milliseconds until the first token, and those that tracing took.
_FRESH = """
import sys, time
started = time.perf_counter()
from mlx_poe import load, stream_generate
model, tokenizer = load(sys.argv[1], dtype=sys.argv[2])
tokens = stream_generate(model, tokenizer, "Once upon a time", max_tokens=16)
next(tokens)
first = time.perf_counter() - started
for _ in tokens: pass
from cognica_mlx.backend import traces
print(1e3 * first, 1e3 * traces.statistics().seconds)
"""


def _first_tokens(setup: Setup, name: str) -> list[Figure]:
    """The first token of a fresh process, with traces and without, and what tracing costs it."""
    command = [sys.executable, "-c", _FRESH, name, dtype_name(setup.model.resid_lambdas.dtype)]
    tracing: list[float] = []

    def fresh(**environment: str) -> float:
        given = {k: v for k, v in os.environ.items() if k != traces.VARIABLE} | environment
        ran = subprocess.run(command, env=given, capture_output=True, text=True)
        if ran.returncode:
            raise RequestError(f"a fresh process failed: {ran.stderr.strip().splitlines()[-1]}")
        first, spent = map(float, ran.stdout.split())
        if not environment:
            tracing.append(spent)
        return first

    plain = "first token of a process, not traced"
    traced = "first token of a process"
    runs: dict[str, Callable[[], float]] = {
        plain: partial(fresh, **{traces.VARIABLE: "0"}),
        traced: fresh,
    }
    taken = setup.interleaved(runs, "first tokens")
    return [
        _figure(plain, "ms", taken),
        _figure(traced, "ms", taken, plain, 1.05),
        figure("host", "tracing, within 16 tokens", "ms", Samples(tuple(tracing[1:]))),
    ]
