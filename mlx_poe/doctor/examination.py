"""All checks of this machine, in the order of the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import mlx.core as mx

from cognica_mlx.bench.machine_card import Machine, this_machine
from cognica_mlx.files.stored import dtype_name, dtype_named
from cognica_mlx.network.device import prepare
from cognica_mlx.pricing.measuring import Progress
from mlx_poe.doctor import agreement, hardware, tracing
from mlx_poe.doctor.agreement import REPORT
from mlx_poe.doctor.recorded import (
    BITS,
    BUILT_IN,
    MODELS,
    difference,
    read_recording,
    recorded_model,
)
from mlx_poe.doctor.verdicts import FAILED, OK, WARNING, Line, Report
from mlx_poe.loading.load import load
from mlx_poe.loading.verify import SAMPLE

# For each type and number of bits: how far logits may be from the recorded ones to pass, how far
# before a check fails, and the share of positions where the best token must be the same. On the CPU
# we saw 1e-5, 0.15, 0.017 and 1e-5, and at least 98.4 % of the tokens.
TOLERANCES: dict[tuple[str, int | None], tuple[float, float, float]] = {
    ("float32", None): (1e-3, 1e-2, 0.99),
    ("bfloat16", None): (0.4, 1.0, 0.96),
    ("float16", None): (0.05, 0.2, 0.98),
    ("float32", BITS): (0.01, 0.1, 0.98),
}


def examine(model: str, progress: Progress | None = None) -> Report:
    """Run all checks: recorded answers with the models that have them, the rest with `model`.

    Raises the errors of `load` for `model`, before any check.
    """
    # MLX reads its settings once, so set them before the first product, in the bandwidth test.
    prepare(mx.float32)
    load(model, lazy=True)
    kinds = list(dict.fromkeys((dtype_name(dtype_named(None)), "float32")))
    machine = this_machine()
    total = 8 + len(MODELS) * len(TOLERANCES) + 14 * len(kinds)  # fewer without WAND
    lines = []
    for line in _all_lines(machine, model, kinds):
        lines.append(line)
        if progress:
            progress("checking", min(len(lines), total), total)
    # Group lines by section, across the types checked.
    order = list(dict.fromkeys(line.section for line in lines))
    return Report(machine, model, sorted(lines, key=lambda line: order.index(line.section)))


def _all_lines(machine: Machine, model: str, kinds: Sequence[str]) -> Iterator[Line]:
    rate = machine.bandwidth
    numbers = {"bytes_a_second": rate}
    yield Line("machine", "memory bandwidth", OK, f"{rate / 1e9:.1f} GB/s", numbers=numbers)
    yield hardware.blas_line()
    yield tokenizer_line()
    yield from prediction_lines()
    for kind in kinds:
        loaded, tokenizer = load(model, dtype=kind)
        for line in (
            agreement.rows(loaded, tokenizer),
            *agreement.modes(loaded, tokenizer),
            *tracing.same_lines(loaded, tokenizer),
        ):
            yield replace(line, name=f"{line.name}, {kind}")
    loaded, tokenizer = load(model)
    yield tracing.host_line(loaded, tokenizer)
    yield from hardware.cost_lines(loaded, tokenizer)


def tokenizer_line() -> Line:
    """Check the built-in tokenizer: the recorded token ids of a text, and the text from its ids."""
    tokenizer, recorded = load(BUILT_IN[0])[1], read_recording(BUILT_IN[0]).tokens.tolist()
    ids = tokenizer.encode(SAMPLE)
    same = sum(a == b for a, b in zip(ids, recorded, strict=False))
    back = tokenizer.decode(ids[1:]) == SAMPLE
    decoded = "decoding gives the text back" if back else "decoding gives another text"
    value = f"{same} of {len(recorded)} token ids are as recorded; {decoded}"
    right = same == len(recorded) and back
    status, advice = (OK, "") if right else (FAILED, REPORT)
    numbers = {"tokens": len(recorded), "same": same}
    return Line("recorded answers", "tokenizer", status, value, advice, numbers)


def prediction_lines() -> Iterator[Line]:
    """Check the recorded answers, in every type and with quantized matrices."""
    for name in MODELS:
        for (dtype, bits), limits in TOLERANCES.items():
            apart, agree = difference(recorded_model(name, dtype, bits), read_recording(name, bits))
            kind = f"{bits} bits" if bits else dtype
            yield _prediction_line(f"{name}, {kind}", apart, agree, limits)


def _prediction_line(
    name: str, apart: float, agree: float, limits: tuple[float, float, float]
) -> Line:
    passes, fails, least = limits
    value = f"logits differ by {apart:.2g} at most; {agree:.1%} of the best tokens are the same"
    numbers = {"apart": apart, "agreement": agree}
    status, advice = OK, ""
    # Written so that NaN fails.
    if not (apart <= fails and agree >= least):
        status, advice = FAILED, REPORT
    elif apart > passes:
        status = WARNING
        advice = "larger than on any machine that we have tested: please tell us"
    return Line("recorded answers", name, status, value, advice, numbers)
