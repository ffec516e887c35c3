"""Many sequences at once: each gives what it gives alone, whatever runs beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import mlx.core as mx
import pytest
from conftest import FIXTURES, SOAK, fixture, goldens
from hypothesis import given, settings
from hypothesis import strategies as st

from cognica_mlx.backend import traces
from cognica_mlx.decoding import batch as batch_module
from cognica_mlx.decoding.batch import Batch
from cognica_mlx.decoding.modes import MODES, ModeOptions, make_mode
from cognica_mlx.decoding.requests import DecodedToken
from cognica_mlx.decoding.sampling import Sampler, SamplingOptions
from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.decoding.single import drive
from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.errors import RequestError
from cognica_mlx.network.model import PoEModel
from mlx_poe.loading.specialists import Specialists


@cache
def models() -> dict[str, PoEModel]:
    """A base, what stands on it, compositions, a Log-OP model; those over one base share it."""
    flat = Specialists(fixture("flat-d8")[0])
    flat.attach("stage", FIXTURES / "stage-on-flat")
    tiny = Specialists(fixture("poe-tiny")[0])
    for name in ("chat", "math"):
        tiny.attach(name, f"poe-tiny-{name}")
    return {
        "flat": flat.base,
        "stage": flat.use("stage"),
        "logop": fixture("gqa-logop-d8")[0],
        "tiny": tiny.base,
        "chat": tiny.use("chat"),
        "math": tiny.use("math"),
        "both": tiny.compose(["chat", "math"], [1, 2]),
    }


@dataclass(frozen=True)
class Plan:
    """One sequence: all that decides what it says."""

    model: str
    start: int
    length: int
    mode: str
    options: dict
    sampling: dict
    count: int
    step_size: int
    slack: int
    joins: int = 0
    leaves: int | None = None

    def sequence(self) -> DecodingSequence:
        """It, with a state of its own."""
        model = models()[self.model]
        text = goldens("flat-d8")["long.tokens"][0].tolist() * 2
        return DecodingSequence(
            model,
            text[self.start : self.start + self.length],
            make_mode(model, self.mode, ModeOptions(**self.options)),
            max_tokens=self.count,
            sampler=Sampler(SamplingOptions(**self.sampling)),
            state=DecodingState(model, slack=self.slack, max_pending=48),
            prefill_step_size=self.step_size,
        )


def alone(plan: Plan) -> list[DecodedToken]:
    """What it gives with nothing beside it."""
    return list(drive(plan.sequence().steps()))


@dataclass
class Made:
    """What a batch has made of a plan."""

    plan: Plan
    sequence: DecodingSequence
    tokens: list[DecodedToken] = field(default_factory=list)
    ended: bool = False
    removed: bool = False


def together(plans: list[Plan], batch: Batch | None = None) -> list[Made]:
    """Run the plans in one batch, each joining and leaving when it says."""
    batch = Batch(prompt_rows=80) if batch is None else batch
    made = [Made(plan, plan.sequence()) for plan in plans]
    waiting, rounds = list(range(len(plans))), 0
    while waiting or len(batch):
        for i in [i for i in waiting if plans[i].joins <= rounds]:
            batch.add(i, made[i].sequence.steps())
            waiting.remove(i)
        rounds += 1
        for event in batch.run():
            one = made[event.name]
            if event.error:
                raise event.error
            if event.token:
                one.tokens.append(event.token)
            else:
                one.ended = True
        for i, one in enumerate(made):
            leaves, over = plans[i].leaves, one.ended or one.removed or i in waiting
            if leaves is not None and not over and len(one.tokens) >= leaves:
                batch.remove(i)
                one.removed = True
    return made


def check(made: list[Made]) -> None:
    """Each sequence's tokens, stages and log-probabilities are those it has alone, and its state
    holds its text."""
    for one in made:
        expected = alone(one.plan)
        got = one.tokens
        if one.removed:
            expected = expected[: len(got)]
        assert [(t.token, t.stage, t.from_draft) for t in got] == [
            (t.token, t.stage, t.from_draft) for t in expected
        ], one.plan
        for ours, theirs in zip(got, expected, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=2e-4)
        assert one.ended or one.removed
        held = one.sequence.state.tokens
        assert held == one.sequence.text[: len(held)]
        assert one.removed or len(held) >= len(one.sequence.text) - 1


@st.composite
def plans(draw: st.DrawFn, family: tuple[str, ...]) -> Plan:
    """Any mode, over any model of the family, with any sampling."""
    model = draw(st.sampled_from(family))
    stages = models()[model].poe_n_stages
    mode = draw(st.sampled_from(list(MODES)))
    options: dict = {}
    if "p99_bounds" in MODES[mode]:
        options["p99_bounds"] = [draw(st.sampled_from([0.1, 0.5]))] * (stages - 1)
    if mode == "speculative":
        options["num_draft_tokens"] = draw(st.integers(1, 6))
        options["draft_stage"] = draw(st.integers(0, stages - 2))
    if mode == "stage":
        options["stage"] = draw(st.integers(0, stages - 1))
    if mode == "prefix":
        options["max_stages"] = draw(st.integers(1, stages))
    sampling: dict = {}
    if draw(st.booleans()):
        sampling = {"temp": 0.8, "top_k": 8, "seed": draw(st.integers(0, 99))}
    if draw(st.booleans()):
        sampling["repetition_penalty"] = 1.3
    return Plan(
        model,
        draw(st.integers(0, 300)),
        draw(st.one_of(st.integers(1, 12), st.integers(120, 330))),
        mode,
        options,
        sampling,
        draw(st.integers(1, 14)),
        draw(st.sampled_from([7, 40])),
        draw(st.sampled_from([8, 24])),
        joins=draw(st.integers(0, 12)),
        leaves=draw(st.one_of(st.none(), st.integers(0, 9))),
    )


FAMILIES = pytest.mark.parametrize(
    "family", [("flat", "stage"), ("logop",), ("tiny", "chat", "math", "both")], ids=str
)


@FAMILIES
@settings(max_examples=3)
@given(data=st.data())
def test_any_schedule_gives_each_sequence_what_it_has_alone(family, data):
    check(together(data.draw(st.lists(plans(family), min_size=2, max_size=5))))


@SOAK
@FAMILIES
@settings(max_examples=12)
@given(data=st.data())
def test_many_schedules_do(family, data):
    check(together(data.draw(st.lists(plans(family), min_size=2, max_size=8))))


def run_through(batch: Batch, made: list[Made]) -> int:
    """Run to the end whatever interrupts; how many interruptions there were."""
    interruptions = calls = 0
    while len(batch):
        calls += 1
        assert calls < 2000, "it does not end"
        try:
            events = batch.run()
        except KeyboardInterrupt:
            interruptions += 1
            continue
        for event in events:
            assert not event.error
            if event.token:
                made[event.name].tokens.append(event.token)
            else:
                made[event.name].ended = True
    return interruptions


def simple(model: str = "flat", mode: str = "full", length: int = 8, **changes) -> Plan:
    options = changes.pop("options", {})
    if "p99_bounds" in MODES[mode]:
        options = {"p99_bounds": [0.2] * (models()[model].poe_n_stages - 1), **options}
    fields = {
        "start": 3,
        "sampling": {},
        "count": 12,
        "step_size": 64,
        "slack": 16,
        **changes,
    }
    return Plan(model=model, length=length, mode=mode, options=options, **fields)


def test_rows_of_all_modes_and_specialists_share_the_bases_passes():
    kinds = [("tiny", "full"), ("chat", "full"), ("math", "full"), ("both", "full")]
    made = together([simple(model, mode) for model, mode in kinds], batch := Batch())
    check(made)
    # A pass a stage for the base's four, and one for each specialist's own.
    tokens = 12
    assert batch.passes == tokens * (4 + 2)
    assert batch.rows == (8 + tokens - 1) * (4 * 4 + 1 + 1 + 2)


@pytest.mark.parametrize(
    "mode",
    [
        mode if mode in ("full", "wand", "speculative") else pytest.param(mode, marks=SOAK)
        for mode in MODES
    ],
)
def test_texts_beyond_every_window_and_draft_lengths_that_differ(mode):
    lengths = (140, 530, 5)
    drafts = "num_draft_tokens" in MODES[mode]
    check(
        together(
            [
                simple("flat", mode, n, options={"num_draft_tokens": i + 1} if drafts else {})
                for i, n in enumerate(lengths)
            ]
        )
    )


def test_rejected_drafts_of_one_sequence_are_hidden_from_it_and_leave_others_alone():
    """With a single-token drafter of random weights nearly every draft is refused, each sequence's
    at another place."""
    made = together(
        [
            simple("flat", "speculative", n, options={"num_draft_tokens": 5}, count=16)
            for n in (4, 9, 140, 141)
        ]
    )
    check(made)
    refused = [one.sequence.drafted - sum(token.from_draft for token in one.tokens) for one in made]
    assert min(refused) > 5


def test_a_prompt_is_fed_between_the_others_tokens():
    long = simple(length=700, step_size=40, count=4)
    short = simple(length=5, count=30)
    batch, order = Batch(prompt_rows=60), []
    batch.add("short", short.sequence().steps())
    batch.add("long", long.sequence().steps())
    while len(batch):
        order += [event.name for event in batch.run() if event.token]
    # The long prompt needs 17 chunks; the short sequence goes on meanwhile.
    assert order.index("long") >= 16


def test_a_prompt_can_be_ended_between_two_chunks():
    batch = Batch()
    batch.add("long", simple(length=700, step_size=40, count=4).sequence().steps())
    assert [batch.run() for _ in range(5)] == [[]] * 5
    assert 0 < batch.rows < 700 * 4
    batch.remove("long")
    assert not len(batch)


def test_a_short_prompt_does_not_wait_for_long_ones():
    batch = Batch(prompt_rows=60)
    for i in range(3):
        batch.add(i, simple(length=600, step_size=40, count=3).sequence().steps())
    batch.add("short", simple(length=12, count=3).sequence().steps())
    first: list = []
    while len(batch):
        first += [event.name for event in batch.run() if event.token]
    assert first[0] == "short"
    assert set(first) == {0, 1, 2, "short"}


def test_one_sequences_failure_ends_that_one_only(monkeypatch):
    plans = [simple(length=n) for n in (4, 5, 6)]
    made = [Made(plan, plan.sequence()) for plan in plans]
    batch, errors = Batch(), {}
    for i, one in enumerate(made):
        batch.add(i, one.sequence.steps())
    real, calls = batch_module.run_stages, []

    def failing(requests, length):
        calls.append(len(requests))
        if len(calls) > 6 and any(r.state is made[1].sequence.state for r in requests):
            raise RuntimeError("out of memory")
        return real(requests, length)

    monkeypatch.setattr(batch_module, "run_stages", failing)
    while len(batch):
        for event in batch.run():
            if event.error:
                errors[event.name] = event.error
            elif event.token:
                made[event.name].tokens.append(event.token)
            else:
                made[event.name].ended = True
    assert list(errors) == [1] and "out of memory" in str(errors[1])
    check([made[0], made[2]])
    # It can go on: what it had emitted is what its state holds.
    monkeypatch.undo()
    one = made[1]
    assert 0 < len(one.tokens) < 12
    model = models()["flat"]
    again = DecodingSequence(
        model,
        one.sequence.text,
        make_mode(model),
        max_tokens=12 - len(one.tokens),
        state=one.sequence.state,
    )
    rest = [token.token for token in drive(again.steps())]
    expected = [token.token for token in alone(one.plan)]
    assert [token.token for token in one.tokens] + rest == expected


def test_an_interruption_at_any_pass_loses_no_sequence(monkeypatch):
    """Ctrl-C in the middle of a pass: the next call goes on where it was."""
    modes = ("full", "wand", "speculative", "stage")
    plans = [simple("flat", mode, 5 + 60 * i, step_size=40) for i, mode in enumerate(modes)]
    made = [Made(plan, plan.sequence()) for plan in plans]
    batch = Batch(prompt_rows=60)
    for i, one in enumerate(made):
        batch.add(i, one.sequence.steps())
    block = type(models()["flat"].h[0])
    real, calls = block.__call__, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) % 7 == 3:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(block, "__call__", interrupted)
    with traces.off():  # a replay calls no block
        assert run_through(batch, made) > 20
    monkeypatch.undo()
    check(made)


@pytest.mark.parametrize(
    "sampling", [pytest.param({}, marks=SOAK), {"temp": 0.8, "seed": 5}], ids=["greedy", "drawn"]
)
def test_an_interruption_in_a_modes_own_code_ends_no_sequence(sampling, monkeypatch):
    made = [
        Made(plan, plan.sequence())
        for i, mode in enumerate(MODES)
        for plan in [
            simple("flat", mode, 5 + 40 * i, step_size=40, sampling=sampling if i % 2 else {})
        ]
    ]
    batch, calls = Batch(prompt_rows=60), []
    for i, one in enumerate(made):
        batch.add(i, one.sequence.steps())
    for owner, name in ((Sampler, "choice"), (DecodingState, "append")):
        real = getattr(owner, name)

        def interrupted(*args, real=real):
            calls.append(1)
            if not len(calls) % 23:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(owner, name, interrupted)
    assert run_through(batch, made) > 5
    monkeypatch.undo()
    check(made)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("mode", ["full", "stage", "wand"])
def test_steps_begun_again_between_two_tokens_draw_the_same_tokens(mode, count):
    """A mode may have drawn the next token already when it is ended."""
    plan = simple("flat", mode, 60, sampling={"temp": 0.8, "seed": 5})
    sequence, got = plan.sequence(), []
    while sequence.budget:
        steps = drive(sequence.steps())
        got += [token.token for _, token in zip(range(count), steps, strict=False)]
    assert got == [token.token for token in alone(plan)]


def test_a_bad_request_ends_one_sequence_with_its_own_error():
    batch = Batch()
    model = models()["flat"]
    bad = DecodingSequence(
        model,
        [1, 2, 3],
        make_mode(model, "speculative", ModeOptions(num_draft_tokens=20)),
        max_tokens=30,
        state=DecodingState(model, slack=4),
    )
    good = simple()
    batch.add("bad", bad.steps())
    batch.add("good", good.sequence().steps())
    ends = {}
    tokens = []
    while len(batch):
        for event in batch.run():
            if event.token:
                tokens.append(event)
            else:
                ends[event.name] = event.error
    assert isinstance(ends["bad"], RequestError) and "the 4 positions" in str(ends["bad"])
    assert ends["good"] is None
    assert [event.token.token for event in tokens] == [token.token for token in alone(good)]


def test_a_state_costs_the_same_in_a_batch():
    """A long prompt's pass is not kept alive by the single rows that rode along with it."""
    plans = [simple(length=n, step_size=64, count=40) for n in (620, 5, 6, 7)]
    made = together(plans, Batch())
    for one in made:
        sequence = one.plan.sequence()
        list(drive(sequence.steps()))
        own = sum(
            array.nbytes for array in {id(a): a for a in one.sequence.state.arrays()}.values()
        )
        # A pass has a row for each slot of a shelf.
        assert own <= 1.1 * sequence.state.nbytes + 6 * 64 * mx.float32.size * 40
