"""Drivers: interrupted, priced, scripted; and what modes ask of them."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import GOLDENS, fixture
from hypothesis import given, settings
from hypothesis import strategies as st

from cognica_mlx.decoding import passes
from cognica_mlx.decoding.modes import ModeOptions, make_mode
from cognica_mlx.decoding.passes import course
from cognica_mlx.decoding.requests import Advance, DecodedToken, Read, Request, Score, Submit
from cognica_mlx.decoding.scripted import RIGHT, WRONG, Script, Scripted
from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.decoding.single import Driver, Single, carry_out, decode, drive, prefill
from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.decoding.targets import full_target, stage_target
from cognica_mlx.decoding.wand import exit_margins
from cognica_mlx.network.model import PoEModel
from cognica_mlx.network.stages import Block
from cognica_mlx.pricing.costs import Costs
from cognica_mlx.pricing.pace import Metered, Pace
from mlx_poe import load

BOUNDS = [0.4, 0.3, 0.2, 0.1, 0.1]
MODES = {
    "full": {},
    "speculative": {"num_draft_tokens": 3},
    "wand": {"p99_bounds": BOUNDS},
}
every_mode = pytest.mark.parametrize("mode", MODES)
PROMPT = [1 + 7 * i % 200 for i in range(45)]


def options_for(model: PoEModel, mode: str) -> ModeOptions:
    options = dict(MODES[mode])
    if "p99_bounds" in options:
        options["p99_bounds"] = BOUNDS[: model.poe_n_stages - 1]
    return ModeOptions(**options)


class Failing:
    """A driver that is interrupted when it has carried out n requests."""

    def __init__(self, at: int):
        self._driver, self._left = Single(), at

    def answer(self, request: Request) -> object:
        if self._left == 0:
            raise KeyboardInterrupt
        self._left -= 1
        return self._driver.answer(request)


class Noted:
    """A driver that keeps what it was asked, with the number of rows at that time."""

    def __init__(self, driver: Driver | None = None):
        self._driver, self.seen = driver or Single(), []

    def answer(self, request: Request) -> object:
        rows = {Advance: "count", Score: "rows"}.get(type(request))
        through = course([request]) if isinstance(request, Advance) else 1
        self.seen.append((request, getattr(request, rows) if rows else 0, through))
        return self._driver.answer(request)

    def count(self, kind: type) -> int:
        return sum(isinstance(request, kind) for request, *_ in self.seen)


# Interruptions


@every_mode
def test_an_interruption_anywhere_leaves_the_state_usable(mode):
    """Prompt and tokens both; in chunks, so that there is much to interrupt."""
    model, _ = fixture("flat-d8")
    chosen = make_mode(model, mode, options_for(model, mode))
    options = {"max_tokens": 4, "prefill_step_size": 16}
    noted = Noted()
    expected = list(decode(model, PROMPT, chosen, driver=noted, **options))
    assert noted.count(Submit) == 2
    for at in range(len(noted.seen)):
        state, taken = DecodingState(model), []
        with pytest.raises(KeyboardInterrupt):
            for one in decode(model, PROMPT, chosen, driver=Failing(at), state=state, **options):
                taken.append(one.token)
        # Nothing is held that is not text.
        assert state.tokens == (PROMPT + taken)[: state.length]
        assert all(filled <= state.length for filled in state.filled)
        again = list(decode(model, PROMPT, chosen, state=state, **options))
        assert [(d.token, d.stage) for d in again] == [(d.token, d.stage) for d in expected]


class FailingBlock(Block):
    """A block that cannot be computed."""

    def __call__(self, *_: object) -> mx.array:
        raise MemoryError


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("layer", [0, 3, 7])
def test_a_pass_that_fails_half_way_changes_nothing(layer, together, monkeypatch):
    """Nor do passes through several stages at once."""
    model, _ = load("poe-tiny", dtype="float32")
    mode = make_mode(model)
    expected = [one.token for one in decode(model, PROMPT, mode, max_tokens=6)]
    state = DecodingState(model)
    prefill(state, PROMPT[:30], 3)
    stage = next(stage for stage in model.stages if layer in stage.layers)
    blocks, at = stage.blocks, stage.layers.index(layer)

    fail = FailingBlock(model.config, layer)
    monkeypatch.setattr(stage, "blocks", [*blocks[:at], fail, *blocks[at + 1 :]])
    if not together:
        monkeypatch.setattr(passes._Pass, "joins", lambda *_: False)
    with pytest.raises(MemoryError):
        list(decode(model, PROMPT, mode, max_tokens=6, state=state))
    k = 0 if together else model.stages.index(stage)
    assert state.filled == [len(PROMPT)] * k + [30] * (4 - k)
    monkeypatch.undo()
    again = decode(model, PROMPT, mode, max_tokens=6, state=state)
    assert [one.token for one in again] == expected
    # The prompt's last token at most has run twice.
    assert max(state.positions_run) <= len(PROMPT) + 6


def test_a_mode_asks_once_for_all_stages_that_a_token_needs():
    model, _ = fixture("flat-d8")
    steps = DecodingSequence(model, PROMPT, make_mode(model), max_tokens=10).steps()
    driver, asked, answer = Noted(), 0, None
    for _ in range(10**3):
        try:
            request = steps.send(answer)
        except StopIteration:
            break
        answer = None
        if isinstance(request, Advance):
            asked += 1
            driver.answer(request)
            assert request.rest() is None
        elif request and not isinstance(request, DecodedToken):
            answer = driver.answer(request)
    # The prompt's last token and nine more.
    assert asked == 10


def test_numbers_are_read_once_a_round():
    model, _ = fixture("flat-d8")
    for mode in ("full", "speculative"):
        noted = Noted()
        chosen = make_mode(model, mode, options_for(model, mode))
        made = list(decode(model, PROMPT, chosen, driver=noted, max_tokens=20))
        rounds = sum(not one.from_draft for one in made)
        # Plain decoding's first is of nothing, to begin on the first token.
        assert noted.count(Read) == rounds + (mode == "full")


# Prices

DISTINCT = Costs(
    (1, 4),
    tuple((1.0 + k, 2.5 + 3 * k) for k in range(6)),
    tuple((0.1 + k / 7, 0.2 + k) for k in range(6)),
    full_boundaries=(3,),
)


@every_mode
@pytest.mark.parametrize("name", GOLDENS)
def test_what_is_metered_is_what_was_asked(name, mode):
    model, _ = fixture(name)
    chosen, noted = make_mode(model, mode, options_for(model, mode)), Noted()
    pace, state = Pace(DISTINCT, chosen, falls_back=False), DecodingState(model)
    driver = Metered(noted, pace)
    options = {"max_tokens": 16, "state": state, "advice": pace}
    list(decode(model, PROMPT[:1], chosen, driver=driver, **options))
    spent, run = 0.0, [0] * model.poe_n_stages
    for request, rows, through in noted.seen:
        if isinstance(request, Advance):
            for stage in range(request.index, request.index + through):
                run[stage] += rows
                spent += DISTINCT.stage(stage, rows)
        elif isinstance(request, Score):
            spent += sum(DISTINCT.head(k, rows) for k in request.target.heads)
    assert pace.spent == pytest.approx(spent) and pace.tokens == 16
    assert state.positions_run == run


def test_shares_of_a_pass_add_up_to_its_price():
    model, _ = fixture("flat-d8")
    states = [DecodingState(model) for _ in range(3)]
    for state, count in zip(states, (1, 2, 4), strict=True):
        state.append(PROMPT[:count])
    requests: list[list[Request]] = [
        [Advance(state, 0) for state in states],
        [Score(state, full_target(model), state.length) for state in states],
    ]
    pace = Pace(DISTINCT, make_mode(model))
    wholes = (DISTINCT.stage(0, 7), DISTINCT.head(3, 7))
    for shared, whole in zip(requests, wholes, strict=True):
        assert sum(pace.price(one, rows=7) for one in shared) == pytest.approx(whole)
    assert pace.price(Read(states[0], ())) == pace.price(Submit(states[0])) == 0
    carry_out(requests[0])
    assert pace.price(requests[0][0]) == 0  # nothing waits any more


def test_what_is_left_of_a_prompt_is_not_the_modes_to_pay():
    model, _ = fixture("flat-d8")
    for mode in ("wand", "speculative"):
        spent = []
        for count in (1, 9):
            chosen = make_mode(model, mode, options_for(model, mode))
            pace = Pace(DISTINCT, chosen, falls_back=False)
            driver = Metered(Single(), pace)
            next(decode(model, [5] * count, chosen, driver=driver, max_tokens=9, advice=pace))
            spent.append(pace.spent)
        assert 0 < spent[1] <= DISTINCT.full_pass(4) * 2
        state = DecodingState(model)
        state.append(PROMPT[:9])
        pace.begins(8)
        assert pace.price(Advance(state, 0)) == DISTINCT.stage(0, 1)


# Scripts

LENGTH = 16


@st.composite
def recordings(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Hits and margins of three stages, (3, LENGTH)."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    hits = rng.random((3, LENGTH)) < draw(st.floats(0.2, 1))
    return hits, rng.choice([0.1, 0.6, 1.5, 3.0], (3, LENGTH)).astype(np.float32)


def scripted(mode: str, script: Script, **options) -> tuple[list[DecodedToken], DecodingSequence]:
    model, _ = fixture("flat-d8")
    chosen = make_mode(model, mode, ModeOptions(**options))
    sequence = DecodingSequence(model, PROMPT[:9], chosen, max_tokens=LENGTH)
    driver = Scripted(Single(), script)
    return list(drive(sequence.steps(), driver)), sequence


class WithMargins(Script):
    """A script in which the best score leads by a recorded margin."""

    def __init__(self, hits: np.ndarray, margins: np.ndarray):
        super().__init__(hits, 9)
        object.__setattr__(self, "margins", margins)

    def __call__(self, request: Score) -> mx.array:
        said, stage = np.array(super().__call__(request)), request.target.depth
        t = min(request.state.length - 9, LENGTH - 1)
        if stage < 3:
            best = said[0].argmax()
            said[0, WRONG if best == RIGHT else RIGHT] = said[0, best] - self.margins[stage, t]
        return mx.array(said)


@settings(max_examples=10)
@given(recordings())
def test_wand_leaves_where_the_recording_is_sure(recording):
    hits, margins = recording
    bounds = [1.0, 0.75, 0.5]
    made, sequence = scripted("wand", WithMargins(hits, margins), p99_bounds=bounds)
    needed = exit_margins(sequence.model, bounds, 1.0)
    for t, one in enumerate(made):
        sure = [k for k in range(3) if margins[k, t] > needed[k]]
        stage = sure[0] if sure else 3
        right = stage == 3 or hits[stage, t]
        assert (one.stage, one.token) == (stage, RIGHT if right else WRONG)


@settings(max_examples=20)
@given(recordings(), st.integers(0, 2), st.integers(1, 6))
def test_drafts_are_kept_and_rejected_as_recorded(recording, stage, count):
    """Against rounds counted by hand."""
    hits = recording[0][stage]
    options = {"draft_stage": stage, "num_draft_tokens": count}
    made, sequence = scripted("speculative", Script(recording[0], 9), **options)
    expected: list[tuple[int, int, bool]] = []
    drafted = 0
    while (t := len(expected)) < LENGTH:
        length = min(count, LENGTH - t - 1)
        drafted += length
        kept = 0
        while kept < length and hits[t + kept]:
            kept += 1
        expected += [(RIGHT, stage, True)] * kept + [(RIGHT, 3, False)]
    assert [(d.token, d.stage, d.from_draft) for d in made] == expected[:LENGTH]
    assert sequence.drafted == drafted


def test_the_real_scores_are_computed_under_a_script():
    """A number that is none comes through."""
    model, _ = fixture("flat-d8")
    state = DecodingState(model)
    prefill(state, PROMPT[:12], 3)

    class Broken:
        def answer(self, request: Request) -> mx.array:
            assert isinstance(request, Score)
            return mx.full((request.rows, model.config.vocab_size), mx.nan)

    script = Script(np.ones((3, 4), dtype=bool), start=9)
    request = Score(state, stage_target(model, 0), 3)
    assert mx.isnan(Scripted(Broken(), script).answer(request)).all()
    real = Single().answer(request)
    said = Scripted(Single(), script).answer(request)
    assert said.shape == real.shape and said.dtype == real.dtype == mx.float32
    assert said.argmax(-1).tolist() == [RIGHT] * 3
