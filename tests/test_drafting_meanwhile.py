"""Drafting goes on while other machines verify; here stages only say that they are elsewhere."""

from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx
import pytest
from conftest import fixture
from hypothesis import given, settings
from hypothesis import strategies as st

from cognica_mlx.bench.sections import several_machines as machines
from cognica_mlx.decoding.advice import Advice
from cognica_mlx.decoding.drafters import OWN, StageDrafter
from cognica_mlx.decoding.modes import ModeOptions, make_mode
from cognica_mlx.decoding.sampling import Sampler, SamplingOptions
from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.decoding.single import Single, drive
from cognica_mlx.decoding.speculative import Speculative
from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.errors import RequestError
from cognica_mlx.pricing.costs import Costs
from cognica_mlx.pricing.pace import Metered, Pace, pace_for
from cognica_mlx.pricing.rounds import RoundCosts
from mlx_poe import load
from mlx_poe.generation.reply_form import make_grammar

PROMPTS = ["Once upon a time", "The capital of France is Paris. The capital of", "3 + 4 ="]
COSTS = Costs(
    (1, 9),
    ((1.0, 2.0), (1.5, 4.0), (1.0, 3.0), (0.5, 1.0)),
    ((0.25, 0.5),) * 4,
    full_boundaries=(3,),
)


class Round(NamedTuple):
    """A verification: of so many drafts; how many were made meanwhile, and whether they are used;
    how long the text is afterwards."""

    drafts: int
    made: int
    used: bool
    end: int


@contextmanager
def elsewhere():
    """poe-tiny with stages 1 to 3 on rank 1, by their own account; and its tokenizer."""
    model, tokenizer = fixture("poe-tiny")
    with pytest.MonkeyPatch.context() as patch:
        for stage in model.stages[1:]:
            patch.setattr(stage, "rank", 1)
        yield model, tokenizer


@pytest.fixture
def there():
    """See `elsewhere`."""
    with elsewhere() as found:
        yield found


@pytest.fixture
def rounds(monkeypatch):
    """What is verified, in turn."""
    seen, made = [], []
    go_on, verify = StageDrafter.go_on, Speculative._verify

    def drafted(*args):
        ahead = yield from go_on(*args)
        made.append(len(ahead) if ahead else 0)
        return ahead

    def verified(mode, sequence, plan, draft):
        made.clear()
        ahead = yield from verify(mode, sequence, plan, draft)
        end = len(sequence.text)
        seen.append(Round(len(draft), made[0] if made else 0, ahead is not None, end))
        return ahead

    monkeypatch.setattr(StageDrafter, "go_on", drafted)
    monkeypatch.setattr(Speculative, "_verify", verified)
    return seen


class Told(Advice):
    """Notes whether it is told that drafting will go on meanwhile."""

    def __init__(self):
        self.meanwhile = set()

    def plan(self, offered, agreeing, most, meanwhile=False):
        self.meanwhile.add(meanwhile)
        return super().plan(offered, agreeing, most, meanwhile)


def decode(model, prompt, mode, tokens, state=None, sampling=None, advice=None, constraint=None):
    sequence = DecodingSequence(
        model,
        prompt,
        mode,
        max_tokens=tokens,
        state=state,
        sampler=Sampler(sampling),
        advice=advice,
        constraint=constraint,
    )
    driver = Metered(Single(), advice) if isinstance(advice, Pace) else None
    steps = drive(sequence.steps(), driver)
    return [(one.token, round(one.logprob, 3)) for one in steps]


@settings(max_examples=4)
@given(
    st.sampled_from(PROMPTS),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from([None, 1.3]),
    st.sampled_from([4, 12, 64]),
)
def test_tokens_are_the_full_models(prompt, drafts, tokens, penalty, slack):
    with elsewhere() as (model, tokenizer):
        check(model, tokenizer.encode(prompt), drafts, tokens, penalty, slack)


def check(model, prompt, drafts, tokens, penalty, slack):
    sampling = SamplingOptions(repetition_penalty=penalty)
    mode = make_mode(model, "speculative", ModeOptions(num_draft_tokens=min(drafts, slack - 1)))
    state = DecodingState(model, slack=slack)
    expected = decode(model, prompt, make_mode(model), tokens, sampling=sampling)
    assert decode(model, prompt, mode, tokens, state, sampling) == expected
    # What was drafted beyond the text is gone: the state can go on.
    text = prompt + [token for token, _ in expected]
    again = decode(model, text, make_mode(model), 5, state, sampling)
    assert again == decode(model, text, make_mode(model), 5, sampling=sampling)


def test_drafts_made_meanwhile_are_used_if_all_before_them_is_kept(there, rounds):
    model, tokenizer = there
    mode = make_mode(model, "speculative", ModeOptions(num_draft_tokens=2))
    told = Told()
    decode(model, tokenizer.encode(PROMPTS[0]), mode, 48, advice=told)
    assert told.meanwhile == {True}
    assert sum(one.used for one in rounds) > 4
    assert all(after.drafts == one.made for one, after in pairwise(rounds) if one.used)
    assert {one.made for one in rounds[:-3]} == {2}  # later there is less room


@pytest.mark.parametrize(("temp", "regex"), [(0.8, None), (0.0, "[a-z ]{9,}")])
def test_what_cannot_be_guessed_is_waited_for(there, rounds, temp, regex):
    model, tokenizer = there
    told, sampling = Told(), SamplingOptions(temp=temp, seed=1)
    constraint = regex and make_grammar(tokenizer, regex=regex).start()
    mode = make_mode(model, "speculative")
    prompt = tokenizer.encode(PROMPTS[0])
    decode(model, prompt, mode, 24, None, sampling, told, constraint)
    assert rounds and all(one.made == 0 for one in rounds)
    assert told.meanwhile == {False}


def test_a_quantized_copy_waits_for_the_verification(there, rounds):
    """It drafts beside the state, which must hold the text."""
    model, tokenizer = there
    mode = make_mode(model, "speculative", ModeOptions(draft_bits=4))
    prompt = tokenizer.encode(PROMPTS[0])
    expected = decode(model, prompt, make_mode(model), 24)
    assert decode(model, prompt, mode, 24) == expected
    assert rounds and all(one.made == 0 for one in rounds)


def test_a_guess_is_worth_nothing_behind_a_rejected_draft(there, monkeypatch):
    model, tokenizer = there
    prompt, go_on, tried = tokenizer.encode(PROMPTS[0]), StageDrafter.go_on, []
    expected = [token for token, _ in decode(model, prompt, make_mode(model), 32)]

    def lucky(drafter, sequence, earlier, count):
        """Guesses the token that the full model will choose in the place of the rejected draft."""
        ahead = yield from go_on(drafter, sequence, earlier, count)
        written = len(sequence.text) - len(prompt)
        drafted = [token.item() for token in earlier.tokens]
        wrong = [i for i, t in enumerate(drafted) if t != expected[written + i]]
        if ahead and wrong:
            ahead.before = mx.array([[expected[written + wrong[0]]]])
            tried.append(wrong[0])
        return ahead

    monkeypatch.setattr(StageDrafter, "go_on", lucky)
    mode = make_mode(model, "speculative", ModeOptions(num_draft_tokens=4))
    assert [token for token, _ in decode(model, prompt, mode, 32)] == expected
    assert tried


def test_what_is_drafted_meanwhile_can_be_rolled_back_past_every_window(there):
    model, _ = there
    prompt = [1 + i * i % 2000 for i in range(400)]  # after which drafts are often refused
    mode = make_mode(model, "speculative", ModeOptions(num_draft_tokens=5))
    state = DecodingState(model, slack=8)
    expected = decode(model, prompt, make_mode(model), 40)
    assert decode(model, prompt, mode, 40, state) == expected


def test_on_one_machine_nothing_is_drafted_meanwhile(rounds):
    model, tokenizer = fixture("poe-tiny")
    decode(model, tokenizer.encode(PROMPTS[0]), make_mode(model, "speculative"), 16)
    assert rounds and all(one.made == 0 for one in rounds)


def test_what_is_spent_is_what_a_clock_would_show(there, rounds):
    model, tokenizer = there
    mode = make_mode(model, "speculative", ModeOptions(num_draft_tokens=3))
    pace = pace_for(model, mode, COSTS)
    pace.falls_back = False
    pace.begins = lambda _: None  # the prompt is one token, and is paid, too
    decode(model, tokenizer.encode("")[:1], mode, 40, advice=pace)
    draft, clock, ready = COSTS.stage(0) + COSTS.head(0), 0.0, False
    for drafts, made, used, _ in rounds:
        # The last draft runs through stage 0, too; then others have it while drafting goes on.
        clock += 0 if ready else drafts * draft + COSTS.stage(0)
        rows, others = drafts + 1, sum(COSTS.stage(k, drafts + 1) for k in (1, 2, 3))
        clock += max(others, (made + 1) * draft if made else 0)
        clock += COSTS.head(3, rows)
        ready = used
    assert any(one.used for one in rounds)
    clock += (1 + 40 - rounds[-1].end) * COSTS.full_token
    assert pace.spent == pytest.approx(clock)


@given(st.floats(0.05, 0.99), st.floats(0.05, 3.0))
def test_a_round_costs_what_it_takes_on_average(rate, step):
    model, _ = fixture("poe-tiny")
    stages = ((step, step), (1.0, 3.0), (1.0, 3.0), (1.0, 3.0))
    costs = Costs((1, 9), stages, ((0.25, 0.5),) * 4, full_boundaries=(3,))
    drafters = make_mode(model, "speculative").drafters
    draft, plans = step + 0.25, {}
    for n in range(1, 9):
        others = sum(costs.stage(k, n + 1) for k in (1, 2, 3))
        refused = 1 - rate ** (n + 1)
        clock = refused * (n * draft + step) + max(others, (n + 1) * draft) + costs.head(3, n + 1)
        plans[n] = clock / sum(rate**i for i in range(n + 1))
    plan, token = RoundCosts(costs, drafters).best(0, 0.0, 8, [rate], meanwhile=True)
    assert token == pytest.approx(min(plans.values())) == pytest.approx(plans[plan.count])


def test_it_is_given_up_where_even_so_it_does_not_pay(there):
    model, _ = there
    mode = make_mode(model, "speculative")
    # Two rows cost other machines nearly twice as much as one.
    dear = Costs((1, 9), ((1.0, 1.0), (1.0, 8.5), (0.0, 0.0), (0.0, 0.0)), ((0.0, 0.0),) * 4, (3,))
    plans = []
    for meanwhile in (False, True):
        pace = Pace(dear, mode)
        for _ in range(40):
            pace.judged(OWN, 1, 1)
        plans.append(pace.plan(0, 0, 3, meanwhile).count)
    assert plans[0] == 0 < plans[1]


@pytest.mark.parametrize(("stage", "refused"), [(0, False), (1, True)])
def test_only_stages_at_hand_can_be_rounded(there, stage, refused):
    model, _ = there
    options = ModeOptions(draft_bits=8, draft_stage=stage)
    if not refused:
        assert make_mode(model, "speculative", options).prefix
        return
    with pytest.raises(RequestError, match="draft_bits: stage 1 is on rank 1"):
        make_mode(model, "speculative", options)


def test_the_benchmark_compares_it_with_the_better_of_one_machines_modes(rounds, monkeypatch):
    measure = machines.measure
    # What is measured decides whether anything is drafted at all.
    monkeypatch.setattr(machines, "measure", lambda *a, **k: measure(*a, **k) and COSTS)
    whole, tokenizer = load("poe-tiny")
    text = tokenizer.encode(PROMPTS[0])
    with elsewhere() as (model, _):
        *others, best, found = machines.Machines(
            model, whole, (0, 1, 1, 1), text, tokens=12, trials=1
        ).speculation(0.8)
    assert any(one.made for one in rounds)
    assert best.speedup == 1.0 and [one.value >= best.value for one in others] == [True]
    assert found.notes["of_ceiling"] == pytest.approx(found.speedup / found.predicted)
    assert found.name.endswith("drafting meanwhile of 2 machines")
