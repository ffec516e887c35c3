"""Drafters: rounded copies of the first stages, tokens looked up, and which of them is chosen."""

import copy
import json
import re
import resource
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import SOAK, fixture, goldens
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoding import chi_squared, drawn_pairs

from cognica_mlx.backend.kernels import norm
from cognica_mlx.bench.shapes import rounded as rounded_model
from cognica_mlx.cache import stage_cache as cache
from cognica_mlx.convert.draft_copy import DRAFT_FILE
from cognica_mlx.decoding.advice import Advice, Plan
from cognica_mlx.decoding.batch import Batch
from cognica_mlx.decoding.constraint import Grammar
from cognica_mlx.decoding.drafters import FORCED, LOOKED_UP, OWN, ROUNDED
from cognica_mlx.decoding.lookup import MOST, NGRAMS, Lookup
from cognica_mlx.decoding.modes import ModeOptions, make_mode
from cognica_mlx.decoding.requests import Advance, DecodedToken, Request, Score
from cognica_mlx.decoding.sampling import Sampler, SamplingOptions
from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.decoding.single import Single, decode, drive
from cognica_mlx.decoding.speculative import _tell
from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.errors import CheckpointError, RequestError
from cognica_mlx.files.safetensors_files import write_arrays
from cognica_mlx.network.model import PoEModel
from cognica_mlx.network.quantized_copies import quantized
from cognica_mlx.network.shared_base import Siblings
from cognica_mlx.pricing.costs import Costs, bytes_read, with_bytes_of
from cognica_mlx.pricing.pace import PATIENCE, WAIT, Metered, Pace
from cognica_mlx.pricing.rounds import WORTH_LEAVING, RoundCosts
from cognica_mlx.pricing.timed_costs import measure_drafter
from cognica_mlx.scheme import DRAFT_BITS, draft_scheme
from mlx_poe import load, stream_generate
from mlx_poe.chat.slash_commands import COMMANDS
from mlx_poe.commands import convert as convert_command
from mlx_poe.commands import generate as generate_command
from mlx_poe.engine import Engine
from mlx_poe.engine.scheduler import Scheduler
from mlx_poe.generation.reply_form import make_grammar
from mlx_poe.generation.request import read_request
from mlx_poe.generation.responses import drafts_by_maker
from mlx_poe.loading.model_info import describe
from mlx_poe.loading.specialists import Specialists
from mlx_poe.loading.tokenizer import Tokenizer
from mlx_poe.server.response_frame import Choice, usage
from mlx_poe.server.shared_fields import Options

STORY = "Once upon a time"
# What poe-tiny goes on with for long, saying much of it again.
FACTS = "The capital of France is Paris. The capital of Japan is Tokyo. The capital of"
# Full depth is dear, and rows are free.
CHEAP = Costs((1, 32), ((1.0, 1.0),) * 4, ((0.1, 0.1),) * 4, full_boundaries=(3,))


def run(
    model: PoEModel,
    prompt: Sequence[int],
    count: int = 32,
    state: DecodingState | None = None,
    sampling: SamplingOptions | None = None,
    grammar: Grammar | None = None,
    **options,
) -> tuple[list[DecodedToken], DecodingSequence]:
    mode = make_mode(model, "speculative" if options else "full", ModeOptions(**options))
    sequence = DecodingSequence(
        model,
        prompt,
        mode,
        max_tokens=count,
        state=state,
        sampler=Sampler(sampling),
        constraint=grammar.start() if grammar else None,
    )
    return list(drive(sequence.steps())), sequence


def ids(decoded: Sequence[DecodedToken]) -> list[int]:
    return [one.token for one in decoded]


def specialists(*names: str) -> Specialists:
    attached = Specialists(fixture("poe-tiny")[0])
    for name in names:
        attached.attach(name, f"poe-tiny-{name}")
    return attached


# Looking up


def found_by_hand(text: Sequence[int], never: set[int], most: int) -> tuple[int, list[int]]:
    """How many tokens agree, and what follows the latest place where they stood before."""
    for n in NGRAMS:
        ends = [e for e in range(n, len(text)) if text[e - n : e] == text[len(text) - n :]]
        if len(text) >= n and ends:
            grown = list(text)
            for i in range(most):
                if grown[ends[-1] + i] in never:
                    break
                grown.append(grown[ends[-1] + i])
            return n, grown[len(text) :]
    return 0, []


@settings(max_examples=150)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.lists(st.integers(1, 9), max_size=20),
    st.sets(st.integers(0, 3), max_size=1),
    st.integers(1, MOST),
)
def test_what_is_looked_up_is_what_stood_there_before(text, pieces, never, most):
    grown: list[int] = []
    lookup, observed = Lookup(grown, never), []
    for size in [*pieces, len(text)]:
        grown += text[len(grown) : len(grown) + size]
        observed += lookup.update()
        assert (lookup.length, lookup.offer(most)) == found_by_hand(grown, never, most)
    hits = []
    for end in range(1, len(text)):
        agreeing, offered = found_by_hand(text[:end], set(), 1)
        if agreeing:
            hits.append((agreeing, offered == [text[end]]))
    assert observed == hits


def test_special_tokens_are_never_looked_up():
    _, tokenizer = fixture("poe-tiny")
    end = tokenizer.token_id("<|assistant_end|>")
    said = tokenizer.encode("The dog ran home.", add_special_tokens=False)
    text = [*said, end, *said]
    assert Lookup(text, tokenizer.special_ids).offer() == []
    assert Lookup(text, ()).offer()[0] == end
    assert end in tokenizer.special_ids and len(tokenizer.special_ids) == 9


# Exactness

DRAFTERS = [
    {"draft_bits": 4, "num_draft_tokens": 5},
    {"draft_bits": 2, "num_draft_tokens": 3},
    {"draft_bits": "mxfp4", "draft_stage": 1},
    {"draft_lookup": True, "num_draft_tokens": 0},
    {"draft_lookup": True, "draft_bits": 3, "num_draft_tokens": 6},
    {"draft_lookup": True, "draft_head": "base", "draft_bits": 4},
]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("flat-d8", options) for options in DRAFTERS),
        ("gqa-logop-d8", DRAFTERS[4]),
        pytest.param("gqa-logop-d8", DRAFTERS[2], marks=SOAK),
        ("stage-on-flat", DRAFTERS[5]),
        *(pytest.param("stage-on-flat", DRAFTERS[i], marks=SOAK) for i in (1, 4)),
        ("chain-on-stage", DRAFTERS[4]),
        pytest.param("poe-tiny", DRAFTERS[0], marks=SOAK),
    ],
    ids=str,
)
def test_every_drafter_gives_the_full_models_tokens(name, options):
    model, tokenizer = fixture(name)
    if name == "poe-tiny":
        prompt = tokenizer.encode(STORY) * 2
    else:
        prompt = goldens(name)["greedy.prompt"].tolist() * 2
    full, _ = run(model, prompt, 16)
    state = DecodingState(model)
    made, sequence = run(model, prompt, 12, state=state, **options)
    assert ids(made) == ids(full)[:12]
    for ours, theirs in zip(made, full, strict=False):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    # The state is the full model's own, whatever has drafted: it goes on in full.
    again = [*prompt, *ids(made)]
    assert state.tokens == again[: state.length]
    assert ids(run(model, again, 4, state=state)[0]) == ids(full)[12:]
    assert sequence.drafted and set(sequence.drafts) <= {ROUNDED, LOOKED_UP}


@pytest.mark.parametrize("length", [520, pytest.param(700, marks=SOAK)])
def test_drafts_beyond_every_window(length):
    """The copy sees the window that the model's own stage sees."""
    model, _ = fixture("poe-tiny")
    text = np.random.default_rng(0).integers(0, 2000, length).tolist()
    full, _ = run(model, text, 12)
    for options in ({"draft_bits": 4}, {"draft_bits": 4, "draft_stage": 2, "draft_lookup": True}):
        assert ids(run(model, text, 12, **options)[0]) == ids(full)


@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_specialists_draft_and_nothing_else_changes(temp):
    attached = specialists("chat", "math")
    both = attached.compose(["chat", "math"])
    _, tokenizer = fixture("poe-tiny")
    prompt = tokenizer.encode("What is 3 plus 4?")
    for model in (attached.use("chat"), both):
        full, _ = run(model, prompt, 12)
        sampling = SamplingOptions(temp=temp, seed=3)
        made, sequence = run(model, prompt, 12, sampling=sampling, draft_bits=4)
        assert sequence.drafts[ROUNDED] and any(one.drafter == ROUNDED for one in made)
        if not temp:
            assert ids(made) == ids(full)


@pytest.mark.parametrize("options", [DRAFTERS[0], DRAFTERS[4]], ids=str)
def test_under_a_constraint_drafts_fit_too(options):
    model, tokenizer = fixture("poe-tiny")
    grammar = make_grammar(tokenizer, regex=r"((yes|no), and then again: ){3}")
    prompt = tokenizer.encode("yes, and then again: yes, and then again: ")
    full, _ = run(model, prompt, 60, grammar=grammar)
    made, sequence = run(model, prompt, 60, grammar=grammar, **options)
    assert ids(made) == ids(full)
    assert sum(one.forced for one in made) and sequence.drafted


def test_what_a_constraint_forbids_is_not_looked_up():
    model, tokenizer = fixture("poe-tiny")
    prompt = tokenizer.encode("The cat sat on the mat. The dog ran. The cat sat on the mat.")
    assert Lookup(prompt).offer()
    grammar = make_grammar(tokenizer, regex="[0-9]{4}")
    options = {"num_draft_tokens": 0, "draft_lookup": True}
    made, _ = run(model, prompt, 9, grammar=grammar, **options)
    assert ids(made) == ids(run(model, prompt, 9, grammar=grammar)[0])


@pytest.mark.parametrize("budget", range(2, 9))
def test_a_round_is_never_longer_than_what_is_left_to_emit(budget):
    """Forced tokens fill a draft, up to the token that the verifier adds."""
    model, tokenizer = fixture("poe-tiny")
    grammar = make_grammar(tokenizer, regex="([ab]xyxyxyxy)*")
    mode = make_mode(model, "speculative", ModeOptions(num_draft_tokens=3))
    sequence = DecodingSequence(
        model, [2039], mode, max_tokens=budget, constraint=grammar and grammar.start()
    )
    rounds = []

    class Watching(Single):
        def answer(self, request: Request):
            if isinstance(request, Score) and request.end is not None:
                rounds.append(request.rows)
                assert request.rows <= sequence.budget
            return super().answer(request)

    assert len(list(drive(sequence.steps(), Watching()))) == budget
    assert max(rounds) > 1


@pytest.mark.parametrize("options", [DRAFTERS[0], DRAFTERS[4]], ids=str)
def test_wherever_it_is_interrupted_nothing_of_a_draft_stays(options):
    model, _ = fixture("flat-d8")
    prompt = goldens("flat-d8")["greedy.prompt"].tolist() * 2
    full = ids(run(model, prompt, 10)[0])
    mode = make_mode(model, "speculative", ModeOptions(**options))
    for at in range(1, 34, 8):
        driver, left, state, taken = Single(), [at], DecodingState(model), []

        class Interrupted:
            def answer(self, request: Request, driver=driver, left=left) -> object:
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return driver.answer(request)

        with pytest.raises(KeyboardInterrupt):
            for one in decode(
                model, prompt, mode, max_tokens=99, state=state, driver=Interrupted()
            ):
                taken.append(one.token)
        assert state.tokens == [*prompt, *taken][: state.length]
        rest = run(model, [*prompt, *taken], max(10 - len(taken), 1), state=state)[0]
        assert ids(rest)[: 10 - len(taken)] == full[len(taken) :]


def test_a_batch_shares_the_copys_passes_and_each_gets_what_it_gets_alone():
    attached = specialists("chat")
    base, chat = attached.base, attached.use("chat")
    _, tokenizer = fixture("poe-tiny")
    options = {"draft_bits": 4, "num_draft_tokens": 4, "draft_lookup": True}
    cases = [
        (model, tokenizer.encode(text))
        for model in (base, chat)
        for text in (STORY, "A cat sat. A cat sat. A cat sat.")
    ]
    batch, made = Batch(), {i: [] for i in range(len(cases))}
    for i, (model, prompt) in enumerate(cases):
        mode = make_mode(model, "speculative", ModeOptions(**options))
        sequence = DecodingSequence(model, prompt, mode, max_tokens=12)
        batch.add(i, sequence.steps())
    while len(batch):
        for event in batch.run():
            assert event.error is None
            if event.token:
                made[event.name].append(event.token)
    for i, (model, prompt) in enumerate(cases):
        alone, _ = run(model, prompt, 12, **options)
        assert [(d.token, d.drafter) for d in made[i]] == [(d.token, d.drafter) for d in alone]
        assert ids(alone) == ids(run(model, prompt, 12)[0])
    assert batch.rows > 1.5 * batch.passes


# Acceptance


@pytest.mark.parametrize(
    ("name", "text", "least"),
    [
        ("poe-tiny", STORY, 0.75),
        pytest.param("poe-tiny-chat", "Tell me a story about a cat.", 0.65, marks=SOAK),
    ],
)
def test_a_rounded_drafter_drafts_well(name, text, least):
    """A copy that is silently broken drafts what the model refuses."""
    model, tokenizer = fixture(name)
    prompt = tokenizer.encode(text)
    if model.config.specialist_layers:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    rates = {}
    for options in ({}, {"draft_bits": 8}, {"draft_bits": 4}):
        made, sequence = run(model, prompt, 64, num_draft_tokens=4, **options)
        kept = sum(one.from_draft for one in made)
        rates[options.get("draft_bits")] = kept / sequence.drafted
    assert min(rates[8], rates[4]) > least
    # Without a specialist's stage the copy drafts as the stages do.
    if not model.config.specialist_layers:
        assert rates[8] == pytest.approx(rates[None], abs=0.05)


def test_what_the_text_says_again_is_looked_up():
    model, tokenizer = fixture("poe-tiny")
    prompt = tokenizer.encode(FACTS)
    made, sequence = run(model, prompt, 100, draft_lookup=True, num_draft_tokens=0)
    kept = sum(one.drafter == LOOKED_UP for one in made)
    assert kept > 24 and kept / sequence.drafts[LOOKED_UP] > 0.35
    assert all(one.stage == 3 for one in made)


# What stands beside the model


def test_a_copy_stands_beside_the_model_and_is_shared():
    attached = specialists("chat", "math")
    base, chat, maths = attached.base, attached.use("chat"), attached.use("math")
    before = mx.array(base.h[0].attn.c_q.weight)
    prefixes = [
        make_mode(model, "speculative", ModeOptions(draft_bits=4)).prefix
        for model in (base, chat, maths, chat)
    ]
    first = prefixes[0]
    assert all(prefix.stages[0] is first.stages[0] for prefix in prefixes)
    assert prefixes[1] is prefixes[3] and prefixes[1].of == (0, 4)
    assert first.stages[0].blocks[0].attn.c_q.bits == 4
    assert mx.array_equal(base.h[0].attn.c_q.weight, before).item()
    # Four bits, and a scale and a bias in 64, of what is 32 bits wide; tables are not copied.
    packed = sum(
        a.size
        for k in ("c_q", "c_k", "c_v", "c_proj")
        for b in base.h[:2]
        for a in [b.attn[k].weight]
    )
    packed += sum(b.mlp[k].weight.size for b in base.h[:2] for k in ("c_fc", "c_proj"))
    packed += base.lm_head.weight.size
    assert first.nbytes == packed * 5 // 8
    assert prefixes[1].nbytes > first.nbytes
    # Predictions go through the rounded heads: the base's and the specialist's, summed.
    hidden = chat.boundaries(mx.array([[1, 2, 3]]))[0]
    said = prefixes[1].target.scores({1: hidden})
    heads = [chat.lm_head, chat.lm_head_specialists[0]]
    h = norm(hidden.x)
    total = sum(quantized(head, draft_scheme(4))(h) for head in heads)[..., : said.shape[-1]]
    assert mx.allclose(said, 15 * mx.tanh(total / 15), atol=1e-4)


def test_drafting_aside_leaves_the_state_as_it_is():
    model, tokenizer = fixture("poe-tiny")
    state = DecodingState(model)
    prompt = tokenizer.encode(STORY)
    run(model, prompt, 4, state=state)
    text = state.tokens[: state.length]
    prefix = make_mode(model, "speculative", ModeOptions(draft_bits=4)).prefix
    held = [np.array(a) for cache in state.caches for pair in cache.rows() for a in pair]
    ran, filled = list(state.positions_run), list(state.filled)
    aside = state.aside(prefix.stages, prefix.of)
    driver = Single()
    for token in (5, 6, 7):
        aside.append([token])
        driver.answer(Advance(aside, 0))
    mx.eval(aside.arrays())
    assert aside.length == len(text) + 3 and aside.filled == [len(text) + 3]
    assert (state.tokens, state.filled, state.positions_run) == (text, filled, ran)
    after = [np.array(a) for cache in state.caches for pair in cache.rows() for a in pair]
    assert all((a == b).all() for a, b in zip(held, after, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_bits": 7}, "draft_bits 7: choose from 2, 3, 4, 5, 6, 8, mxfp4, nvfp4"),
        ({"draft_bits": True}, "draft_bits True"),
        ({"num_draft_tokens": 0}, "num_draft_tokens 0 is not between 1 and 64"),
        ({"draft_bits": 4, "draft_stage": 9}, "draft_stage 9"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options, message):
    model, _ = fixture("poe-tiny")
    with pytest.raises(RequestError, match=message):
        make_mode(model, "speculative", ModeOptions(**options))


def test_rounding_what_is_rounded_already():
    model = rounded_model(fixture("poe-tiny")[0], 4)
    with pytest.raises(RequestError, match="no matrix that can be quantized to 4 bits"):
        make_mode(model, "speculative", ModeOptions(draft_bits=4))
    # From 4 bits down to 2 there is something to save.
    prompt = [5, 6, 7, 8]
    made, sequence = run(model, prompt, 16, draft_bits=2)
    assert ids(made) == ids(run(model, prompt, 16)[0]) and sequence.drafts[ROUNDED]


def test_a_calibration_advises_rounding_where_that_can_be():
    model, _ = fixture("poe-tiny")
    options = {"draft_bits": 4, "draft_stage": 0, "num_draft_tokens": 7}
    advice = replace(model.calibration, options={"speculative": options})
    mode = make_mode(model, "speculative", None, advice)
    assert mode.prefix and mode.num_draft_tokens == 7
    mode = make_mode(rounded_model(model, 4), "speculative", None, advice)
    assert mode.prefix is None and mode.num_draft_tokens == 7


def test_every_number_of_bits_has_a_scheme():
    assert [draft_scheme(bits).bits for bits in DRAFT_BITS] == [2, 3, 4, 5, 6, 8, 4, 4]
    assert draft_scheme("4") == draft_scheme(4)


# What is chosen


def rounds_by_hand(costs: Costs, plan: Plan, prefix: bool) -> float:
    rows = plan.looked_up + plan.count + 1
    full = costs.full_pass
    if not plan.count:
        return full(rows)
    if prefix:
        own = costs.rounded
        first = own.stage(0, plan.looked_up + 1) + own.head(0)
        return first + (plan.count - 1) * (own.stage(0) + own.head(0)) + full(rows)
    first = costs.lower(0, plan.looked_up + 1) + costs.head(0)
    more = (plan.count - 1) * (costs.lower(0) + costs.head(0))
    return first + more + costs.lower(0) + costs.upper(0, rows)


@given(
    st.floats(0.05, 1.0),
    st.floats(0.0, 0.3),
    st.floats(0.0, 0.99),
    st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99)),
    st.integers(0, MOST),
)
@settings(max_examples=40)
def test_the_plan_is_the_cheapest_there_is(step, slope, hits, rates, offered):
    model, _ = fixture("poe-tiny")
    line = (1.0, 1.0 + 31 * slope)
    drafter = Costs((1, 32), ((step, step),), ((step / 4,) * 2,), (0,))
    costs = replace(Costs((1, 32), (line,) * 4, ((0.1, 0.1),) * 4, (3,)), rounded=drafter)
    drafters = make_mode(model, "speculative", ModeOptions(draft_bits=4)).drafters
    assert [one.name for one in drafters] == [ROUNDED, OWN]
    rounds = RoundCosts(costs, drafters)

    def token(plan: Plan) -> float:
        rate = rates[plan.drafter]
        made = sum(hits**i for i in range(plan.looked_up + 1))
        made += hits**plan.looked_up * sum(rate**i for i in range(1, plan.count + 1))
        return rounds_by_hand(costs, plan, plan.drafter == 0) / made

    looked, least = rounds.best_lookup(offered, hits)
    cheapest = min(token(Plan(count)) for count in range(offered + 1))
    worth = cheapest < WORTH_LEAVING * costs.full_token
    assert least == pytest.approx(cheapest if worth else costs.full_token)
    assert bool(looked) == worth
    drafted, cost = rounds.best(looked.looked_up, hits, 6, rates)
    every = [
        Plan(ahead, which, count)
        for ahead in (0, looked.looked_up)
        for which in (0, 1)
        for count in range(1, 7)
    ]
    assert cost == pytest.approx(min(map(token, every))) == pytest.approx(token(drafted))


def test_the_drafter_that_is_cheaper_is_taken_and_one_that_fails_is_left():
    model, _ = fixture("poe-tiny")
    mode = make_mode(model, "speculative", ModeOptions(draft_bits=4))
    quick = Costs((1, 32), ((0.2, 0.2),), ((0.05, 0.05),), (0,))
    pace = Pace(replace(CHEAP, rounded=quick), mode)
    assert pace.plan(0, 0, 6).drafter == 0 and pace.plan(0, 0, 6).count > 2
    for _ in range(12):
        pace.judged(ROUNDED, 0, 4)
    assert pace.plan(0, 0, 6).drafter == 1
    slow = Costs((1, 32), ((3.0, 3.0),), ((0.05, 0.05),), (0,))
    assert Pace(replace(CHEAP, rounded=slow), mode).plan(0, 0, 6).drafter == 1
    # What nobody measured costs as much less as it has fewer bytes.
    guessed = Pace(CHEAP, mode).costs.rounded
    assert 0.1 < guessed.stage(0) < 0.2 and 0.01 < guessed.full_head() < 0.02


def test_drafting_is_given_up_and_tried_again_later():
    model, _ = fixture("poe-tiny")
    pace = Pace(CHEAP, make_mode(model, "speculative"))
    assert pace.plan(0, 0, 3)
    for _ in range(PATIENCE):
        pace.judged(OWN, 0, 3)
        pace.emitted()
    assert not pace.plan(0, 0, 3)
    assert "times as much as at full depth" in (pace.fell_back or "")
    for _ in range(WAIT - 1):
        pace.emitted()
        assert not pace.plan(0, 0, 3)
    pace.emitted()
    assert pace.plan(0, 0, 3) and pace.fell_back is None
    for _ in range(PATIENCE):
        pace.judged(OWN, 0, 3)
    assert not pace.plan(0, 0, 3)
    pace.tokens += WAIT
    assert not pace.plan(0, 0, 3)  # it waits twice as long
    pace.others = 3  # with others it may be otherwise
    assert pace.plan(0, 0, 3) or pace.fell_back


def test_only_what_was_judged_tells_how_good_a_drafter_is():
    heard = []

    class Listening(Advice):
        def judged(self, drafter: str, kept: int, drafted: int) -> None:
            heard.append((drafter, kept, drafted))

    makers = [LOOKED_UP, LOOKED_UP, OWN, FORCED, OWN]
    for accepted in range(len(makers) + 1):
        _tell(Listening(), makers, accepted)
    # Behind a refused token that was looked up nothing was judged.
    assert heard == [(OWN, 0, 2), (OWN, 1, 2), (OWN, 1, 2), (OWN, 2, 2)]


def test_looking_up_is_gated_by_what_would_have_been_right():
    model, _ = fixture("poe-tiny")
    mode = make_mode(model, "speculative", ModeOptions(draft_lookup=True, num_draft_tokens=0))
    line = (1.0, 1.0 + 31 * 0.3)
    pace = Pace(Costs((1, 32), (line,) * 4, (line,) * 4, (3,)), mode)
    assert not pace.plan(16, NGRAMS[-1], 0) and pace.fell_back is None
    for _ in range(30):
        pace.observed(NGRAMS[-1], True)
    assert pace.plan(16, NGRAMS[-1], 0).looked_up > 1
    for _ in range(200):
        pace.observed(NGRAMS[-1], False)
    assert not pace.plan(16, NGRAMS[-1], 0)


def test_a_text_that_says_itself_again_takes_few_passes_and_prose_none_in_vain():
    model, tokenizer = fixture("poe-tiny")
    line = (1.0, 1.2)
    costs = Costs((1, 16), (line,) * 4, (line,) * 4, (3,))
    mode = make_mode(model, "speculative", ModeOptions(draft_lookup=True, num_draft_tokens=0))
    spent = {}
    for text in (FACTS, STORY):
        pace = Pace(costs, mode)
        prompt = tokenizer.encode(text)
        sequence = DecodingSequence(model, prompt, mode, max_tokens=100, advice=pace)
        list(drive(sequence.steps(), Metered(Single(), pace)))
        spent[text] = pace.spent / (100 * costs.full_token)
        assert pace.fell_back is None
    again, prose = spent.values()
    assert again < 0.7 and prose < 1.03


def test_what_a_round_costs_is_what_is_metered():
    model, tokenizer = fixture("poe-tiny")
    mode = make_mode(model, "speculative", ModeOptions(draft_bits=4, num_draft_tokens=3))
    own = Costs((1, 32), ((0.2, 0.2),), ((0.05, 0.05),), (0,))
    pace = Pace(replace(CHEAP, rounded=own), mode, falls_back=False)
    sequence = DecodingSequence(model, tokenizer.encode(STORY), mode, max_tokens=41, advice=pace)
    made = list(drive(sequence.steps(), Metered(Single(), pace)))
    rounds = sum(not one.from_draft for one in made)
    assert pace.spent == pytest.approx(sequence.drafted * 0.25 + rounds * 4.1)


def test_costs_of_a_copy_are_bytes_or_measured():
    chat = specialists("chat").use("chat")
    prefix = make_mode(chat, "speculative", ModeOptions(draft_bits=4)).prefix
    by_bytes = with_bytes_of(bytes_read(chat), prefix).rounded
    assert len(by_bytes.stages) == 2
    total = by_bytes.lower(1) + by_bytes.full_head()
    # Of gates, which are not rounded, the copy reads the model's own.
    assert total == pytest.approx(prefix.nbytes, rel=0.01)
    measured = measure_drafter(prefix, (1, 2), trials=1)
    assert np.array(measured.stages).shape == (2, 2) and (np.array(measured.stages) > 0).all()
    assert measured.full_head() > 0


def test_siblings_draft_through_all_their_heads():
    attached = specialists("chat", "math")
    both = attached.compose(["chat", "math"])
    assert isinstance(both, Siblings)
    prefix = make_mode(both, "speculative", ModeOptions(draft_bits=8)).prefix
    assert prefix.of == (0, 4, 5) and [s.source for s in prefix.stages] == [0, 1, 1]
    siblings = both.with_quantized_heads(draft_scheme(8))
    heads = [head for k in (4, 5) for head in siblings.heads(k)]
    assert all(head.bits == 8 for head in heads) and prefix.target.boundaries == (1, 2)


# From files and commands


def endless(tokenizer: Tokenizer) -> Tokenizer:
    """One at whose tokens no reply ends."""
    other = copy.copy(tokenizer)
    other.eos_token_ids = frozenset()
    return other


def test_a_copy_is_stored_beside_the_model_and_taken_up(tmp_path, capsys):
    flags = ["--hf-path", "poe-tiny", "--mlx-path", str(tmp_path / "mlx"), "--draft-bits", "4"]
    assert convert_command.main(flags) == 0
    assert "quantized copy" in capsys.readouterr().out
    model, tokenizer = load(tmp_path / "mlx")
    original, _ = fixture("poe-tiny")
    assert model.stored_copies
    made, _ = run(model, tokenizer.encode(STORY), 24, draft_bits=4)
    theirs, _ = run(original, tokenizer.encode(STORY), 24, draft_bits=4)
    assert [(d.token, d.drafter) for d in made] == [(d.token, d.drafter) for d in theirs]
    file = mx.load(str(tmp_path / "mlx" / DRAFT_FILE))
    stored, scales = (file[f"h.0.attn.c_q.{name}"] for name in ("weight", "scales"))
    taken = make_mode(model, "speculative", ModeOptions(draft_bits=4)).prefix.stages[0]
    assert not model.stored_copies and mx.array_equal(taken.blocks[0].attn.c_q.weight, stored)
    # In the type that the folder has, which is not what rounding here would give.
    assert mx.array_equal(taken.blocks[0].attn.c_q.scales, scales.astype(mx.float32))
    # Other bits are rounded as ever.
    assert make_mode(model, "speculative", ModeOptions(draft_bits=8)).prefix.nbytes
    (tmp_path / "mlx" / DRAFT_FILE).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"is not a quantized copy.*delete it"):
        load(tmp_path / "mlx")
    mx.save_safetensors(str(tmp_path / "mlx" / DRAFT_FILE), {"x": stored}, {"draft_bits": "4"})
    with pytest.raises(CheckpointError, match="does not fit its model at"):
        run(load(tmp_path / "mlx")[0], [5], 4, draft_bits=4)


def test_a_copy_beside_another_model_of_its_shape_is_refused(tmp_path):
    for name in ("chat", "math"):
        flags = ["--hf-path", f"poe-tiny-{name}", "--mlx-path", str(tmp_path / name)]
        assert convert_command.main([*flags, "--draft-bits", "4"]) == 0
    shutil.copy(tmp_path / "chat" / DRAFT_FILE, tmp_path / "math" / DRAFT_FILE)
    for quantize in (None, 8):
        run(load(tmp_path / "chat", quantize=quantize)[0], [5], 4, draft_bits=4)
    with pytest.raises(CheckpointError, match=r"belongs to another model: its .* differs"):
        run(load(tmp_path / "math")[0], [5], 4, draft_bits=4)


def test_a_copy_that_the_disk_cannot_hold_is_an_error_that_names_the_folder(
    tmp_path, capsys, monkeypatch
):
    def full(*args: object) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
        try:
            write_arrays(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr("cognica_mlx.convert.draft_copy.write_arrays", full)
    argv = ["--hf-path", "poe-tiny", "--mlx-path", str(tmp_path / "mlx"), "--draft-bits", "4"]
    assert convert_command.main(argv) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / 'mlx'} cannot be written: is the disk full?" in error
    assert error.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["-q"], ["-q", "--q-bits", "8"], ["-q", "--q-mode", "mxfp8"]])
def test_a_copy_that_would_not_be_used_is_refused_before_anything_is_written(
    tmp_path, capsys, flags
):
    argv = ["--hf-path", "poe-tiny", "--mlx-path", str(tmp_path / "mlx"), "--draft-bits", "4"]
    assert convert_command.main([*argv, *flags]) == 2
    assert "the copy would not be used" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_copy_holds_only_what_is_not_quantized_itself(tmp_path):
    argv = ["--hf-path", "poe-tiny", "--mlx-path", str(tmp_path / "mlx"), "--draft-bits", "4"]
    assert convert_command.main([*argv, "-q", "--q-bits", "8", "--q-bits-for", "stage0=16"]) == 0
    stored = mx.load(str(tmp_path / "mlx" / DRAFT_FILE))
    assert "h.0.attn.c_q.weight" in stored and "lm_head.weight" not in stored
    model, tokenizer = load(tmp_path / "mlx")
    _, sequence = run(model, tokenizer.encode(STORY), 12, draft_bits=4)
    assert sequence.drafts[ROUNDED] and not model.stored_copies


def test_a_delta_stores_no_copy(tmp_path, capsys):
    flags = ["--hf-path", "poe-tiny", "--mlx-path", str(tmp_path / "base")]
    assert convert_command.main(flags) == 0
    flags = ["--hf-path", "poe-tiny-chat", "--base", str(tmp_path / "base"), "--draft-bits", "4"]
    assert convert_command.main([*flags, "--mlx-path", str(tmp_path / "delta")]) == 2
    assert "draft-bits: a delta has no stage of the base" in capsys.readouterr().err


def test_the_command_says_which_drafter_made_what(capsys):
    flags = ["--prompt", STORY, "-m", "60", "--mode", "speculative", "--no-fallback"]
    flags += ["--draft-bits", "4", "--num-draft-tokens", "4"]
    assert generate_command.main([*flags, "--verbose"]) == 0
    shown = capsys.readouterr()
    counts = r"(\d+) of (\d+)"
    found = re.search(rf"Acceptance: {counts} draft.*: quantized stages {counts}\n", shown.err)
    kept, made, *each = map(int, found.groups())
    assert [kept, made] == each and kept
    assert generate_command.main([*flags, "--json"]) == 0
    reply = json.loads(capsys.readouterr().out)
    assert reply["text"] + "\n" == shown.out
    assert reply["drafts"] == {"rounded": made}
    assert Counter(token["drafter"] for token in reply["tokens"])["rounded"] == kept


def test_options_of_drafters_come_as_numbers_words_and_flags():
    model, tokenizer = fixture("poe-tiny")
    for options, message in (
        ({"draft_lookup": 1}, "draft_lookup must be True or False"),
        ({"draft_bits": 4.5}, "draft_bits takes whole numbers"),
        ({"draft_bits": "fp9"}, "draft_bits 'fp9': choose from"),
    ):
        with pytest.raises(RequestError, match=message):
            list(stream_generate(model, tokenizer, STORY, mode="speculative", **options))
    with pytest.raises(RequestError, match="draft_bits belongs to mode speculative"):
        list(stream_generate(model, tokenizer, STORY, mode="wand", draft_bits=4))


def test_a_schedulers_memory_counts_the_copy():
    model, tokenizer = fixture("poe-tiny")
    options = {"mode": "speculative", "max_tokens": 8}
    plain = read_request(tokenizer, STORY, {"num_draft_tokens": 6, **options}).on(model)
    task = read_request(tokenizer, STORY, {"draft_bits": 4, **options}).on(model)
    scheduler = Scheduler(memory=1 << 30)
    copied = task.mode.prefix.nbytes
    need = scheduler.bytes_needed(task)
    # The drafter's own rows beside the stage's.
    assert need > scheduler.bytes_needed(plain)
    tight = Scheduler(memory=need + copied - 1)
    with pytest.raises(RequestError, match=r"with 0.4 MB of quantized stages"):
        tight.check(task)
    enough = Scheduler(memory=need + copied)
    enough.add(task)
    while len(enough):
        assert not any(isinstance(news, Exception) for _, news in enough.step())
    # It stays with the model: what is kept of prompts has to leave room for it.
    assert enough._free == need
    enough.close()


def test_an_engines_request_drafts_as_it_asks():
    model, tokenizer = fixture("poe-tiny")
    with Engine(model, endless(tokenizer), costs=lambda *_: CHEAP) as engine:
        options = {"mode": "speculative", "max_tokens": 40}
        request = engine.submit(FACTS, draft_bits=4, draft_lookup=True, **options)
        responses = list(request)
    tokens = [response.token for response in responses]
    assert tokens == ids(run(model, tokenizer.encode(FACTS), 40)[0])
    kept = {maker: kept for maker, (kept, _) in drafts_by_maker(responses).items()}
    assert kept["rounded"] and sum(kept.values()) == sum(r.from_draft for r in responses)


def test_the_servers_usage_tells_the_drafters_apart():
    model, tokenizer = fixture("poe-tiny")
    options = {"mode": "speculative", "draft_bits": 4, "draft_lookup": True}
    responses = list(stream_generate(model, endless(tokenizer), FACTS, max_tokens=60, **options))
    choice = Choice(tokenizer.eos_token_ids)
    for response in responses:
        choice.add(response)
    served = SimpleNamespace(info=describe(model))
    figures = usage(Options(served, 40, 40, decoding={"mode": "speculative"}), [choice])
    by_maker = figures["poe"]["drafts"]
    for maker, (kept, made) in drafts_by_maker(responses).items():
        assert by_maker[maker] == {"accepted": kept, "rejected": made - kept}
    assert set(by_maker) == {"rounded", "lookup"}


@SOAK
def test_sampled_tokens_follow_the_full_models_distribution():
    """Chi-squared over the first two tokens; what is looked up is likely, and not certain."""
    model, _ = fixture("flat-d8")
    options = {"draft_lookup": True, "draft_bits": 4, "num_draft_tokens": 17}
    sampling = SamplingOptions(seed=11, temp=1.3, top_k=4)
    prompt = goldens("flat-d8")["greedy.prompt"].tolist()[:6]
    probable = ids(run(model, prompt, 3)[0])
    text = [*prompt, *probable, *prompt]
    seen = drawn_pairs(model, text, "speculative", sampling, 500, **options)
    statistic, cells = chi_squared(model, text, sampling, seen, 4)
    # The 99.9th percentile of chi-squared with 15 degrees of freedom.
    assert cells == 16 and statistic < 37.7


@pytest.mark.parametrize(
    ("said", "options"),
    [
        ("0 4", {"draft_stage": 0, "num_draft_tokens": 4}),
        ("1 6 4-bit lookup", {"draft_stage": 1, "num_draft_tokens": 6, "draft_bits": "4"}),
        ("mxfp4", {"draft_stage": 0, "draft_bits": "mxfp4"}),
        ("lookup", {"draft_stage": 0}),
    ],
)
def test_draft_in_the_chat(said, options):
    heard = []
    chat = SimpleNamespace(set_mode=lambda mode, **given: heard.append((mode, given)))
    COMMANDS["draft"].do(SimpleNamespace(chat=chat), said)
    looked_up = {"draft_lookup": True} if "lookup" in said else {}
    assert heard == [("speculative", options | looked_up)]


@pytest.mark.parametrize("tail", [24, 5])
def test_beside_large_buffers_drafts_copy_none(tail, monkeypatch):
    """Drafts and their verification go to tails, until these are full."""
    model, tokenizer = fixture("poe-tiny")
    prompt = tokenizer.encode(STORY)
    full, _ = run(model, prompt, 32)
    monkeypatch.setattr(cache, "LARGE", 1)
    monkeypatch.setattr(cache, "TAIL", tail)
    state = DecodingState(model)
    made, sequence = run(model, prompt, 32, state=state, draft_bits=4, num_draft_tokens=4)
    assert ids(made) == ids(full) and sequence.drafts[ROUNDED] > 12
    spans = [span.tail for span in state.caches[0].content.spans.values()]
    assert max(spans) > 0 and max(spans) <= tail
