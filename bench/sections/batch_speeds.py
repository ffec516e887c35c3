"""Many sequences at once: against one, in mixed modes, beside a prompt. Against mlx-lm: `host`.

- in: a setup; the options that a calibration gives the modes
- out: tokens per second, each with a ratio from the same trials and the ceiling that the cost of a
  batch of rows sets
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from cognica_mlx.bench.sections.stage_speeds import Figure, Setup, figure
from cognica_mlx.bench.timing import Samples, once_begun
from cognica_mlx.calibration_file import Calibration
from cognica_mlx.decoding.batch import Batch
from cognica_mlx.decoding.modes import PACED_MODES, ModeOptions, make_mode
from cognica_mlx.decoding.sequence import DecodingSequence, prefill_step_size_here
from cognica_mlx.pricing.pace import Pace
from cognica_mlx.pricing.timed_costs import measure

COUNTS = (1, 4, 8, 16)
MIXED = 8
# How much longer each prompt is than the one before.
STEP = 5


def prompts(setup: Setup, count: int) -> list[list[int]]:
    """`count` prompts of different lengths, the longest as long as the setup's context."""
    texts = [list(text) for text in setup.texts]
    cut = [texts[i % len(texts)] for i in range(count)]
    return [text[: max(len(text) - STEP * i, 4)] for i, text in enumerate(cut)]


def batches(setup: Setup, calibration: Calibration | None) -> list[Figure]:
    """All figures of the section."""
    return [*_counts(setup), _mixed(setup, calibration), _beside_a_prompt(setup), _memory(setup)]


def _sequence(setup: Setup, text: Sequence[int], **options: Any) -> DecodingSequence:
    """A text to continue, at full depth unless `options` have another mode."""
    mode = options.pop("mode", None) or make_mode(setup.model)
    return DecodingSequence(setup.model, text, mode, **{"max_tokens": setup.tokens, **options})


def _run(setup: Setup, texts: Sequence[Sequence[int]]) -> float:
    """Tokens per second after each sequence's first."""
    batch = Batch()
    for i, text in enumerate(texts):
        batch.add(i, _sequence(setup, text).steps())
    return once_begun(tokens_of(batch), len(texts))[1]


def tokens_of(batch: Batch) -> Iterator[Hashable]:
    """For each token, the name of its sequence, until all sequences have ended."""
    while len(batch):
        for event in batch.run():
            if event.error:
                raise event.error
            if event.token:
                yield event.name


def _rates(name: str, samples: Samples, baseline: Samples, **more: Any) -> Figure:
    return figure("batch", name, "tokens/s", samples, baseline=baseline, **more)


def _counts(setup: Setup) -> list[Figure]:
    """Several sequences at full depth, against one, and the ceiling from the cost of rows."""
    ceilings: dict[int, list[float]] = {count: [] for count in COUNTS}

    def rows() -> None:
        costs = measure(setup.model, COUNTS, text=setup.texts[0], trials=1)
        for count in COUNTS:
            ceilings[count].append(count * costs.full_pass() / costs.full_pass(count))

    names = {f"{n} sequence{'s' * (n > 1)}, full depth": n for n in COUNTS}
    cases = {name: partial(_run, setup, prompts(setup, n)) for name, n in names.items()}
    taken = setup.interleaved(cases, "batches", rows)
    one = next(iter(taken.values()))
    return [
        _rates(name, samples, one, predicted=float(np.median(ceilings[names[name]][1:])))
        for name, samples in taken.items()
    ]


def _mixed(setup: Setup, calibration: Calibration | None) -> Figure:
    """Sequences in different modes, paced by measured costs, against all at full depth."""
    model = setup.model
    names = ["full", "speculative", "stage", *(["wand"] if calibration else [])]
    texts = prompts(setup, MIXED)
    costs = measure(model, text=setup.texts[0], trials=2)
    fell_back: list[str] = []

    def mixed() -> float:
        batch = Batch()
        fell_back.clear()
        paces = []
        for i, text in enumerate(texts):
            name = names[i % len(names)]
            mode = make_mode(model, name, ModeOptions(), calibration)
            pace = Pace(costs, mode) if name in PACED_MODES else None
            sequence = _sequence(setup, text, mode=mode, advice=pace, fallback=make_mode(model))
            paces.append((name, pace))
            batch.add(i, sequence.steps(), pace)
        rate = once_begun(tokens_of(batch), len(texts))[1]
        fell_back.extend(name for name, pace in paces if pace and pace.fell_back)
        return rate

    full = partial(_run, setup, texts)
    taken = setup.interleaved({"full": full, "mixed": mixed}, "mixed modes")
    notes = {"fell_back": ", ".join(fell_back) or "none"}
    label = f"{MIXED} sequences in {', '.join(names)}"
    return _rates(label, taken["mixed"], taken["full"], notes=notes)


def _beside_a_prompt(setup: Setup) -> Figure:
    """How many chunks of a long prompt are read before a short request that arrives meanwhile gets
    its first token."""
    long = setup.text(max(8 * prefill_step_size_here(), 1024))
    batch, chunks = Batch(), 0

    def chunk_read(_: int, __: int) -> None:
        nonlocal chunks
        chunks += 1

    def add(name: str, text: Sequence[int], tokens: int, **options: Any) -> None:
        batch.add(name, _sequence(setup, text, max_tokens=tokens, **options).steps())

    add("guide", setup.texts[0], 40)  # gives events while the prompt is read
    add("long", long, 2, progress=chunk_read)
    while chunks < 2:
        batch.run()
    begun = chunks
    add("short", setup.texts[0][:9], 2)
    while not any(event.name == "short" and event.token for event in batch.run()):
        pass
    batch.close()
    label = f"chunks until a short request's first token, beside a prompt of {len(long)}"
    return figure("batch", label, "chunks", float(chunks - begun))


def _memory(setup: Setup) -> Figure:
    """Memory held by a batch at its end, without the weights, and its share of separate states'."""
    mx.clear_cache()
    before = mx.get_active_memory()
    batch, states = Batch(), 0
    sequences = [_sequence(setup, text) for text in prompts(setup, MIXED)]
    for i, sequence in enumerate(sequences):
        batch.add(i, sequence.steps())
    while len(batch):
        batch.run()
        arrays = {id(a): a for one in sequences for a in one.state.arrays()}
        states = max(states, sum(a.nbytes for a in arrays.values()))
    mx.clear_cache()
    held = mx.get_active_memory() - before
    notes = {"of_states": held / states}
    return figure("batch", f"held for {MIXED} sequences", "GB", held / 1e9, notes=notes)
