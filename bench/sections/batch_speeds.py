"""Many sequences at once: against one, against mlx-lm's batch, in mixed modes, beside a prompt.

- in: a setup; the options that a calibration gives the modes
- out: tokens per second, each with a ratio from the same trials and the ceiling that the cost of a
  batch of rows sets
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
from mlx_lm.generate import BatchGenerator

from cognica_mlx.bench.sections.stage_speeds import Figure, Setup, figure
from cognica_mlx.bench.timing import Samples, interleaved
from cognica_mlx.calibration_file import Calibration
from cognica_mlx.decoding.batch import Batch
from cognica_mlx.decoding.modes import PACED_MODES, ModeOptions, make_mode
from cognica_mlx.decoding.sequence import DecodingSequence, Mode, prefill_step_size_here
from cognica_mlx.network.mlx_lm_model import Model
from cognica_mlx.pricing.costs import nbytes
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


def batches(setup: Setup, calibration: Calibration | None, *, peer: bool = False) -> list[Figure]:
    """All figures of the section; with `peer` also mlx-lm's batch over the same weights."""
    found = [*_counts(setup), *_mixed(setup, calibration), *_beside_a_prompt(setup)]
    found += _memory(setup)
    if peer:
        found += _peer(setup)
    return found


def _run(setup: Setup, texts: Sequence[Sequence[int]], modes: Sequence[Mode]) -> float:
    """Tokens per second after each sequence's first; every sequence has its mode, default full."""
    batch = Batch()
    for i, text in enumerate(texts):
        sequence = DecodingSequence(
            setup.model, text, modes[i % len(modes)], max_tokens=setup.tokens
        )
        batch.add(i, sequence.steps())
    return _rate(batch, len(texts))


def _rate(batch: Batch, count: int) -> float:
    begun: set[object] = set()
    tokens, started = 0, 0.0
    while len(batch):
        events = batch.run()
        for event in events:
            if event.error:
                raise event.error
        made = [event.name for event in events if event.token]
        tokens += len(made) if started else 0
        begun.update(made)
        if len(begun) == count and not started:
            started = time.perf_counter()
    return tokens / (time.perf_counter() - started)


def _counts(setup: Setup) -> list[Figure]:
    """Several sequences at full depth, against one, and the ceiling from the cost of rows."""
    full = [make_mode(setup.model)]
    ceilings: dict[int, list[float]] = {count: [] for count in COUNTS}

    def rows() -> None:
        costs = measure(setup.model, COUNTS, text=setup.texts[0], trials=1)
        for count in COUNTS:
            ceilings[count].append(count * costs.full_pass() / costs.full_pass(count))

    texts = {count: prompts(setup, count) for count in COUNTS}
    taken = interleaved(
        {str(n): partial(_run, setup, texts[n], full) for n in COUNTS},
        setup.trials,
        setup.progress,
        "batches",
        rows,
    )
    one = taken["1"]
    return [
        figure(
            "batch",
            f"{count} sequence{'s' * (count > 1)}, full depth",
            "tokens/s",
            taken[str(count)],
            speedup=taken[str(count)].over(one),
            predicted=Samples(tuple(ceilings[count][1:])).median,
        )
        for count in COUNTS
    ]


def _mixed(setup: Setup, calibration: Calibration | None) -> list[Figure]:
    """Sequences in different modes, paced by measured costs, against all at full depth."""
    model = setup.model
    names = ["full", "speculative", "stage", *(["wand", "certified"] if calibration else [])]
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
            sequence = DecodingSequence(
                model, text, mode, max_tokens=setup.tokens, advice=pace, fallback=make_mode(model)
            )
            paces.append((name, pace))
            batch.add(i, sequence.steps(), pace)
        rate = _rate(batch, len(texts))
        fell_back.extend(name for name, pace in paces if pace and pace.parked)
        return rate

    full = partial(_run, setup, texts, [make_mode(model)])
    taken = interleaved({"full": full, "mixed": mixed}, setup.trials, setup.progress, "mixed modes")
    note: dict[str, float | str] = {"fell_back": ", ".join(fell_back) or "none"}
    label = f"{MIXED} sequences in {', '.join(names)}"
    speedup = taken["mixed"].over(taken["full"])
    return [figure("batch", label, "tokens/s", taken["mixed"], speedup=speedup, notes=note)]


def _beside_a_prompt(setup: Setup) -> list[Figure]:
    """How many chunks of a long prompt are read before a short request that arrives meanwhile gets
    its first token."""
    chunk = prefill_step_size_here()
    long, mode = setup.text(max(8 * chunk, 1024)), make_mode(setup.model)
    waited = []
    for _ in range(setup.trials):
        batch = Batch()
        chunks: list[int] = []

        def chunk_read(done: int, _: int, chunks: list[int] = chunks) -> None:
            chunks.append(done)

        one = DecodingSequence(setup.model, long, mode, max_tokens=2, progress=chunk_read)
        guide = DecodingSequence(setup.model, setup.texts[0], mode, max_tokens=40)
        batch.add("guide", guide.steps())  # gives events while the prompt is read
        batch.add("long", one.steps())
        short = None
        first = 0
        while len(batch):
            if short is None and len(chunks) >= 2:
                short = DecodingSequence(setup.model, setup.texts[0][:9], mode, max_tokens=2)
                batch.add("short", short.steps())
                first = len(chunks)
            if any(event.name == "short" and event.token for event in batch.run()):
                waited.append(float(len(chunks) - first))
                break
        batch.close()
    label = f"chunks until a short request's first token, beside a prompt of {len(long)}"
    return [figure("batch", label, "chunks", Samples(tuple(waited)))]


def _memory(setup: Setup) -> list[Figure]:
    """Memory held by the states of a batch, and the peak while it decodes, without the weights."""
    model, texts = setup.model, prompts(setup, MIXED)
    mode = make_mode(model)
    mx.clear_cache()
    before = mx.get_active_memory() - nbytes(model)
    batch = Batch()
    sequences = [DecodingSequence(model, t, mode, max_tokens=setup.tokens) for t in texts]
    for i, sequence in enumerate(sequences):
        batch.add(i, sequence.steps())
    states = 0
    while len(batch):
        batch.run()
        arrays = {id(a): a for one in sequences for a in one.state.arrays()}
        states = max(states, sum(a.nbytes for a in arrays.values()))
    mx.clear_cache()
    held = mx.get_active_memory() - nbytes(model) - before
    note: dict[str, float | str] = {"of_states": held / states}
    return [
        figure("batch", f"held for {MIXED} sequences", "GB", Samples((held / 1e9,)), notes=note)
    ]


def _peer(setup: Setup) -> list[Figure]:
    """16 prompts of different lengths: ours, one by one and together, and mlx-lm's batch over the
    same weights."""
    texts = prompts(setup, COUNTS[-1])
    theirs = Model(setup.model.config)
    theirs.update(setup.model.parameters())
    theirs.eval()
    mode = make_mode(setup.model)

    def timed(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        return len(texts) * setup.tokens / (time.perf_counter() - started)

    def ours(slots: int) -> None:
        waiting = list(enumerate(texts))
        batch = Batch()
        while waiting or len(batch):
            while waiting and len(batch) < slots:
                i, text = waiting.pop(0)
                one = DecodingSequence(setup.model, text, mode, max_tokens=setup.tokens)
                batch.add(i, one.steps())
            batch.run()

    def mlx_lm() -> None:
        together, tokens = len(texts), setup.tokens
        generator = BatchGenerator(theirs, max_tokens=tokens, completion_batch_size=together)
        generator.insert([list(text) for text in texts], [tokens] * together)
        while generator.next_generated():
            pass
        generator.close()

    runs: dict[str, Callable[[], object]] = {
        "ours, one by one": partial(ours, 1),
        "ours": partial(ours, len(texts)),
        "mlx-lm": mlx_lm,
    }
    cases = {name: partial(timed, work) for name, work in runs.items()}
    taken = interleaved(cases, setup.trials, setup.progress, "mlx-lm's batch")
    return [
        figure(
            "batch",
            f"{len(texts)} prompts, {name}",
            "tokens/s",
            samples,
            speedup=samples.over(taken["mlx-lm"]),
        )
        for name, samples in taken.items()
    ]
