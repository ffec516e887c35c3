"""The machine itself: the BLAS in use, the costs of rows and modes."""

from __future__ import annotations

import mlx.core as mx

from cognica_mlx.backend import blas
from cognica_mlx.bench.machine_card import slow_blas
from cognica_mlx.decoding.modes import PACED_MODES, ModeOptions, make_mode
from cognica_mlx.decoding.single import Single, decode
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.costs import Costs
from cognica_mlx.pricing.pace import Metered, Pace
from cognica_mlx.pricing.timed_costs import measure
from mlx_poe.doctor.agreement import PROMPTS, TOKENS, cases
from mlx_poe.doctor.verdicts import OK, WARNING, Line
from mlx_poe.loading.tokenizer import Tokenizer

ROWS = (1, 2, 4, 8, 16)
# Drafting three tokens pays only if four rows cost less than this many single ones.
FOUR_ROWS = 3.0
PACED_PROMPTS = 6
TRIALS = 3


def blas_line() -> Line:
    """The BLAS in use, and whether a batch of rows pays with it."""
    if mx.default_device() != mx.cpu:
        return Line("machine", "BLAS", OK, "not used: products run on the GPU")
    if blas.advice:
        return Line("machine", "BLAS", WARNING, blas.in_use(), blas.advice)
    # A single slow result may be chance, if something else is running.
    if not all(slow_blas() for _ in range(TRIALS)):
        return Line("machine", "BLAS", OK, blas.in_use())
    advice = "with this BLAS everything is slow, and drafts do not pay; " + blas.REMEDY
    value = f"{blas.in_use()}; eight rows cost about as much as eight single ones"
    return Line("machine", "BLAS", WARNING, value, advice)


def cost_lines(model: PoEModel, tokenizer: Tokenizer) -> list[Line]:
    """The cost of several rows, and whether each mode that drafts or exits early pays."""
    costs = measure(model, ROWS, text=tokenizer.encode(PROMPTS[0]) * 4)
    times = {n: costs.full_pass(n) / costs.full_token for n in ROWS[1:]}
    value = ", ".join(f"{n} rows {times[n]:.2f}" for n in times) + " times one row"
    dear = times[4] > FOUR_ROWS
    advice = "four rows cost nearly as much as four single ones: drafts cannot pay" if dear else ""
    numbers = {f"rows_{n}": ratio for n, ratio in times.items()}
    numbers["full_token_seconds"] = costs.full_token
    status = WARNING if dear else OK
    lines = [Line("costs", "a pass at full depth", status, value, advice, numbers)]
    paced = [name for name in cases(model) if name in PACED_MODES]
    return lines + [_pays(model, tokenizer, costs, mode) for mode in paced]


def _pays(model: PoEModel, tokenizer: Tokenizer, costs: Costs, name: str) -> Line:
    """A token's cost in a mode, from the measured costs."""
    spent = tokens = 0.0
    for prompt in PROMPTS[:PACED_PROMPTS]:
        mode = make_mode(model, name, ModeOptions(), model.calibration)
        pace = Pace(costs, mode, falls_back=False)
        driver = Metered(Single(), pace)
        ids = tokenizer.encode(prompt)
        for _ in decode(model, ids, mode, driver=driver, advice=pace, max_tokens=TOKENS):
            pass
        spent, tokens = spent + pace.spent, tokens + pace.tokens
    ratio = spent / tokens / costs.full_token
    value = f"a token costs {ratio:.2f} of one at full depth"
    status, advice = OK, ""
    if not ratio < 1:
        status = WARNING
        advice = "it does not pay with this model, so decoding falls back to full depth"
    return Line("costs", name, status, value, advice, {"share": ratio})
