"""What each drafter is worth: how often its tokens are accepted, and the speed-up to expect.

- in: a model and prompts that suit it; or only a model's shape and an assumed acceptance
- out: a figure for each drafter: acceptance, tokens per round, its memory, and the speed-up by
  bytes of weights read at this acceptance, with the best number of drafts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cognica_mlx.bench.sections.stage_speeds import Figure, Setup, figure
from cognica_mlx.decoding.drafters import StageDrafter
from cognica_mlx.decoding.modes import ModeOptions, make_mode
from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.decoding.single import drive
from cognica_mlx.decoding.speculative import Speculative
from cognica_mlx.decoding.targets import stage_target
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.costs import bytes_read, with_bytes_of
from cognica_mlx.pricing.rounds import RoundCosts
from cognica_mlx.scheme import DRAFT_BITS

# Beginnings of the kinds of text that poe-tiny has learned; other models can continue them too.
BEGINNINGS = (
    "Once upon a time",
    "The capital of France is",
    "There was a child called",
    "3 + 4 =",
    "One day, a girl",
    "People in Brazil speak",
    "In the morning",
    "Kenya is a country in",
    "A long time ago",
)
# Questions for specialists.
QUESTIONS = (
    "Tell me a story about a cat.",
    "What is the capital of France?",
    "Hello! How are you?",
    "What is 12 plus 30?",
    "Tom has 3 apples and buys 4 more. How many does he have?",
    "What is the weather in Paris?",
)
# Assumed acceptance of stage 0's drafts if only a shape is known: the reference's measurement.
ASSUMED = 0.88
# Drafts per round when measuring acceptance, and the most when pricing by bytes.
DRAFTS, MOST = 4, 8


def drafts(
    setup: Setup, prompts: Sequence[Sequence[int]], assumed: float | None = None
) -> list[Figure]:
    """Acceptance of every drafter along greedy replies to `prompts`; without prompts, `assumed`.
    For looked-up tokens it is the share of all tokens offered."""
    cases: dict[str, dict[str, Any]] = {"the stages as they are": {}}
    for bits in DRAFT_BITS:
        cases[f"a copy of {bits}{' bits' * bits.isdigit()}"] = {"draft_bits": bits}
    if prompts:
        cases["looked up"] = {"draft_lookup": True, "num_draft_tokens": 0}
    found = []
    for i, (name, options) in enumerate(cases.items()):
        options = {"num_draft_tokens": DRAFTS, **options}
        mode = make_mode(setup.model, "speculative", ModeOptions(draft_stage=0, **options))
        assert isinstance(mode, Speculative)
        notes: dict[str, float | str] = {}
        rate = assumed or ASSUMED
        if prompts:
            rate, notes["tokens_a_round"] = _acceptance(setup, mode, prompts)
        predicted = None
        if mode.drafters:
            predicted, notes["best_drafts"] = by_bytes(setup.model, mode.drafters[0], rate)
        if mode.prefix:
            notes["copy_mb"] = mode.prefix.nbytes / 1e6
        more: dict[str, Any] = {"predicted": predicted, "notes": notes}
        found.append(figure("drafts", name, "% kept", 100 * rate, **more))
        if setup.progress:
            setup.progress("drafters", i + 1, len(cases))
    return found if prompts else [*found, *_bounds(setup.model, assumed or ASSUMED)]


def _bounds(model: PoEModel, rate: float) -> list[Figure]:
    """The most that two other ways to draft could give, by bytes: not verifying what stage 0 is
    sure of, if that were everything; and a cheaper head for its drafts, if it cost nothing."""
    target, costs = stage_target(model, 0), bytes_read(model)
    alone = costs.full_token / (costs.lower(0) + costs.target(target))
    free, count = by_bytes(model, StageDrafter(replace(target, heads=())), rate)
    sure, headless = "bound: stage 0, never verified", "bound: the stages with a free head"
    more: dict[str, Any] = {"predicted": free, "notes": {"best_drafts": count}}
    return [
        figure("drafts", sure, "% kept", 100.0, predicted=alone),
        figure("drafts", headless, "% kept", 100 * rate, **more),
    ]


def _acceptance(
    setup: Setup, mode: Speculative, prompts: Sequence[Sequence[int]]
) -> tuple[float, float]:
    """The probability that a draft is accepted if those before it were, and tokens per round."""
    kept = rejected = tokens = rounds = drafted = 0
    for prompt in prompts:
        sequence = DecodingSequence(setup.model, prompt, mode, max_tokens=setup.tokens)
        row = [one.from_draft for one in drive(sequence.steps())]
        kept += sum(row)
        # A round ends with the full model's own token, after the first rejection or all drafts.
        rounds += len(row) - sum(row)
        tokens += len(row)
        runs = "".join("d" if one else " " for one in row).split(" ")[:-1]
        rejected += sum(len(run) < mode.num_draft_tokens for run in runs)
        drafted += sequence.drafted
    judged = kept + rejected if mode.drafters else drafted
    return kept / max(judged, 1), tokens / max(rounds, 1)


def by_bytes(model: PoEModel, drafter: StageDrafter, rate: float) -> tuple[float, int]:
    """The best speed-up over plain decoding at this acceptance, with bytes of weights read as the
    cost, and the number of drafts that gives it."""
    costs = bytes_read(model)
    if drafter.prefix:
        costs = with_bytes_of(costs, drafter.prefix)
    rounds = RoundCosts(costs, [drafter])
    plan, token = rounds.best(0, 0.0, MOST, [rate])
    return rounds.plain / token, plan.count
