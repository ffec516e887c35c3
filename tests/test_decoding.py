"""Every mode against the known answers, and against its rule with everything computed afresh."""

import json
from collections import Counter
from dataclasses import replace
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, GOLDENS, SOAK, fixture, goldens
from hypothesis import given, settings
from hypothesis import strategies as st

from cognica_mlx.decoding import speculative
from cognica_mlx.decoding.batch import Batch
from cognica_mlx.decoding.choosing import DRAFT, choose_from
from cognica_mlx.decoding.drafters import Draft
from cognica_mlx.decoding.modes import MODES, ModeOptions, make_mode
from cognica_mlx.decoding.requests import DecodedToken
from cognica_mlx.decoding.sampling import ACCEPTED, CHOSEN, Sampler, SamplingOptions
from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.decoding.single import decode, prefill, set_depth
from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.decoding.wand import exit_margins
from cognica_mlx.errors import RequestError
from cognica_mlx.network.model import PoEModel, log_op

TINY = json.loads((FIXTURES / "poe-tiny-goldens.json").read_text())
MODELS = (*GOLDENS, "poe-tiny")
INF = float("inf")


def run(
    model: PoEModel,
    prompt: list[int],
    mode: str,
    count: int = 40,
    sampling: SamplingOptions | None = None,
    state: DecodingState | None = None,
    **options,
) -> list[DecodedToken]:
    chosen = make_mode(model, mode, ModeOptions(**options))
    sampler = Sampler(sampling)
    return list(decode(model, prompt, chosen, max_tokens=count, sampler=sampler, state=state))


def ids(decoded: list[DecodedToken]) -> list[int]:
    return [one.token for one in decoded]


def prompts(name: str) -> list[list[int]]:
    """A short prompt and one beyond every window."""
    if name == "poe-tiny":
        long = [t for entry in TINY["base"] for t in entry["prompt"] + entry["full"]]
        return [TINY["base"][0]["prompt"], (long * 2)[:650]]
    return [goldens(name)["greedy.prompt"].tolist(), goldens(name)["long.tokens"][0].tolist()]


def stage_scores(model: PoEModel, tokens: list[int], start: int) -> list[np.ndarray]:
    """From one plain forward without any cache: the scores (T, V) of every stage, the running
    Log-OP where the model pools, and of the full model last, from position `start` on."""
    boundaries = [hidden[start:] for hidden in model.boundaries(mx.array([tokens]))]
    stages = [model.stage_logits(k, hidden) for k, hidden in enumerate(boundaries)]
    if model.pools_stages:
        stages = [model.pool(stages[: k + 1]) for k in range(len(stages))]
    return [np.array(z[0]) for z in (*stages, model.full_scores(dict(enumerate(boundaries))))]


@cache
def prefilled(name: str, which: int) -> DecodingState:
    """A state that holds a prompt but for its last token, in all stages."""
    model, _ = fixture(name)
    state = DecodingState(model)
    prefill(state, prompts(name)[which][:-1], model.poe_n_stages - 1)
    return state


@cache
def plain(name: str, which: int, stage: int | None = None) -> list[DecodedToken]:
    """What the full model, or a stage, says after a prompt: 14 tokens."""
    model, _ = fixture(name)
    prompt, options = prompts(name)[which], {} if stage is None else {"stage": stage}
    state = prefilled(name, which).fork()
    return run(model, prompt, "stage" if options else "full", 14, state=state, **options)


def lead(scores: np.ndarray) -> float:
    second, best = np.sort(scores)[-2:]
    return float(best - second)


@pytest.mark.parametrize("name", GOLDENS)
def test_greedy_full_and_stages_match_the_goldens(name):
    (model, _), answers = fixture(name), goldens(name)
    prompt = answers["greedy.prompt"].tolist()
    assert ids(run(model, prompt, "full", 32)) == answers["greedy.full"].tolist()[:32]
    for stage in range(4):
        decoded = run(model, prompt, "stage", 16, stage=stage)
        assert ids(decoded) == answers[f"greedy.stage_{stage}"].tolist()[:16]
        assert {one.stage for one in decoded} == {stage}


@pytest.mark.parametrize("entry", TINY["base"][:3], ids=lambda e: str(e["prompt"][1:3]))
def test_trained_model_matches_its_goldens(entry):
    """Decoded by the full model and by one of the stages; those of all stages against a forward."""
    model, _ = fixture("poe-tiny")
    prompt, full = entry["prompt"], entry["full"]
    assert ids(run(model, prompt, "full", len(full))) == full
    stage = TINY["base"].index(entry) % (model.poe_n_stages - 1)
    answer = entry[f"stage_{stage}"]
    assert ids(run(model, prompt, "stage", len(answer), stage=stage)) == answer
    for key in entry.keys() - {"prompt", "full"}:
        answer, stage = entry[key], int(key.removeprefix("stage_"))
        scores = stage_scores(model, prompt + answer[:-1], len(prompt) - 1)[stage]
        assert scores.argmax(-1).tolist() == answer


@pytest.mark.parametrize("name", MODELS)
def test_speculation_gives_the_full_models_tokens(name):
    model, _ = fixture(name)
    for which, length in enumerate((10, 6)):
        prompt, state, full = prompts(name)[which], prefilled(name, which), plain(name, which)
        full = full[:length]
        for draft_stage in range(model.poe_n_stages):
            count = (1, 2, 3, 5, 8)[(2 * draft_stage + 3 * which) % 5]
            decoded = run(
                model,
                prompt,
                "speculative",
                length,
                state=state.fork(),
                draft_stage=draft_stage,
                num_draft_tokens=count,
            )
            assert ids(decoded) == ids(full), (draft_stage, count)
            for ours, theirs in zip(decoded, full, strict=True):
                assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
                assert ours.stage == (draft_stage if ours.from_draft else theirs.stage)


@pytest.mark.parametrize("name", MODELS)
def test_prefix_and_compose_mix_what_they_say(name):
    model, _ = fixture(name)
    prompt, last = prompts(name)[0], model.poe_n_stages - 1
    stages = model.forward_all_stages(mx.array([prompt]))
    first = run(model, prompt, "prefix", 1, max_stages=2)[0]
    mixed = log_op(stages[:2], [0.5, 0.5]) if model.pools_stages else stages[1]
    assert first.token == mixed[0, -1].argmax().item() and first.stage == 1
    weights = [3.0, -1.0]
    first = run(model, prompt, "compose", 1, stages=[last, 0], stage_weights=weights)[0]
    mixed = log_op([stages[last], stages[0]], [1.5, -0.5])
    assert first.token == mixed[0, -1].argmax().item() and first.stage == last
    everything = ids(run(model, prompt, "compose", 12))
    stages = model.forward_all_stages(mx.array([prompt + everything]))
    mixed = log_op(stages, [1 / len(stages)] * len(stages))[0]
    assert everything == mixed.argmax(axis=-1).tolist()[len(prompt) - 1 : -1]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("bound", "safety", "exits"), [(0.4, 0.5, None), (0.3, 1.0, [1])])
def test_wand_equals_its_rule_recomputed_from_scratch(name, bound, safety, exits):
    model, _ = fixture(name)
    steps = model.poe_n_stages - 1
    bounds, depths = [bound] * steps, set()
    for which, count in enumerate((24, 8)):
        prompt, state = prompts(name)[which], prefilled(name, which).fork() if which else None
        options = {"p99_bounds": bounds, "safety": safety, "exit_stages": exits}
        decoded = run(model, prompt, "wand", count, state=state, **options)
        scores = stage_scores(model, prompt + ids(decoded)[:-1], len(prompt) - 1)
        for i, one in enumerate(decoded):
            may_leave = [
                k
                for k in (range(steps) if exits is None else exits)
                if lead(scores[k][i]) > safety * sum(bounds[k:])
            ]
            depth = min(may_leave, default=steps)
            best = scores[depth if depth < steps else -1][i].argmax()
            assert (one.token, one.stage) == (best, depth)
            depths.add(depth)
    assert len(depths) > 1, "a test in which all tokens leave at one stage shows little"


@pytest.mark.parametrize("name", MODELS)
def test_bounds_of_infinity_mean_full_depth_and_of_zero_stage_0(name):
    model, _ = fixture(name)
    steps = model.poe_n_stages - 1
    for which, prompt in enumerate(prompts(name)):
        full, shallow = plain(name, which), plain(name, which, 0)
        state = prefilled(name, which).fork() if which else None
        decoded = run(model, prompt, "wand", 8, state=state, p99_bounds=[INF] * steps)
        assert ids(decoded) == ids(full[:8])
        state = prefilled(name, which).fork() if which else None
        decoded = run(model, prompt, "wand", 8, state=state, p99_bounds=[0.0] * steps)
        assert ids(decoded) == ids(shallow[:8]) and {d.stage for d in decoded} == {0}
        # Not a number is what infinity times nothing would be.
        state = prefilled(name, which).fork()
        decoded = run(model, prompt, "wand", 4, state=state, p99_bounds=[INF] * steps, safety=0.0)
        assert ids(decoded) == ids(full[:4])


@pytest.mark.parametrize("mode", ["full", "wand", "speculative"])
@pytest.mark.parametrize("name", ["flat-d8", "gqa-logop-d8"])
def test_no_position_runs_twice_through_a_stage_unless_rolled_back(name, mode):
    model, _ = fixture(name)
    state, prompt = DecodingState(model), prompts(name)[1]
    rolled_back = [0] * model.poe_n_stages
    rollback = state.rollback

    def counting(position: int) -> None:
        for stage, filled in enumerate(state.filled):
            rolled_back[stage] += max(filled - position, 0)
        rollback(position)

    state.rollback = counting  # type: ignore[method-assign]
    options = (
        {"p99_bounds": [0.2] * (model.poe_n_stages - 1)} if "p99_bounds" in MODES[mode] else {}
    )
    run(model, prompt, mode, 60, state=state, **options)
    for stage, filled in enumerate(state.filled):
        assert state.positions_run[stage] == filled + rolled_back[stage]
    if mode == "full":
        assert rolled_back == [0] * model.poe_n_stages


@pytest.mark.parametrize("name", ["flat-d8", pytest.param("gqa-logop-d8", marks=SOAK)])
def test_repetition_penalty_is_the_same_one_token_or_many_at_a_time(name):
    model, _ = fixture(name)
    sampling = SamplingOptions(repetition_penalty=1.4, repetition_context_size=12)

    for prompt in ([3], prompts(name)[0]):
        decoded = ids(run(model, prompt, "full", 24, sampling))
        scores = stage_scores(model, prompt + decoded[:-1], len(prompt) - 1)[-1]
        for i, token in enumerate(decoded):
            for seen in set((prompt + decoded[:i])[-12:]):
                scores[i][seen] *= 1.4 if scores[i][seen] < 0 else 1 / 1.4
            assert token == scores[i].argmax()
        assert ids(run(model, prompt, "speculative", 24, sampling, num_draft_tokens=4)) == decoded
        inf = [INF] * (model.poe_n_stages - 1)
        assert ids(run(model, prompt, "wand", 24, sampling, p99_bounds=inf)) == decoded


@SOAK
@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("flat-d8", "full", {}),
        ("flat-d8", "speculative", {"num_draft_tokens": 2}),
        ("gqa-logop-d8", "speculative", {"num_draft_tokens": 2, "draft_stage": 1}),
    ],
)
def test_sampled_tokens_follow_the_full_models_distribution(name, mode, options):
    """Chi-squared over the first two tokens, the draft's and the verifier's filters included."""
    model, _ = fixture(name)
    prompt, width = goldens(name)["greedy.prompt"].tolist()[:6], 4
    sampling = SamplingOptions(
        seed=11, temp=1.3, top_k=width, repetition_penalty=1.2, repetition_context_size=20
    )
    seen = drawn_pairs(model, prompt, mode, sampling, 500, **options)
    statistic, cells = chi_squared(model, prompt, sampling, seen, width)
    # The 99.9th percentile of chi-squared with 15 degrees of freedom.
    assert cells == 16 and statistic < 37.7


@pytest.mark.parametrize("trials", [300, pytest.param(1000, marks=SOAK)])
def test_drafts_far_from_the_full_model_leave_its_distribution_alone(trials):
    """Stage 0 and the full model put much weight on different tokens here, so that a biased
    acceptance, or a replacement drawn from the wrong rest, shows."""
    model, _ = fixture("flat-d8")
    sampling = SamplingOptions(seed=5, temp=0.7, top_k=6)
    prompt = next(
        text
        for start in range(0, 200, 5)
        if distance(model, text := goldens("flat-d8")["long.tokens"][0].tolist()[start:][:6]) > 0.6
    )
    seen = drawn_pairs(model, prompt, "speculative", sampling, trials, num_draft_tokens=2)
    statistic, cells = chi_squared(model, prompt, sampling, seen, 6)
    # The 99.9th percentile with 35 degrees of freedom.
    assert cells == 36 and statistic < 66.6


def test_each_place_of_a_draft_is_decided_by_its_own_numbers():
    model, _ = fixture("flat-d8")
    prompt, sampler = prompts("flat-d8")[0], Sampler(SamplingOptions(seed=4, temp=1.2))
    mode = make_mode(model, "speculative")
    sequence = DecodingSequence(model, prompt, mode, max_tokens=9, sampler=sampler)
    draft = Draft(len(prompt) - 1, [{}])
    for token in (5, 6):
        draft.add_certain("lookup", token, sequence)
    assert speculative._choice(sequence, draft).numbers == [
        (1.2, sampler.number(p, CHOSEN), sampler.number(p, ACCEPTED))
        for p in range(len(prompt), len(prompt) + 3)
    ]


def distance(model: PoEModel, tokens: list[int]) -> float:
    """Total variation distance between what stage 0 and the full model predict next."""
    scores = stage_scores(model, tokens, len(tokens) - 1)
    p, q = (np.array(mx.softmax(mx.array(z[0]) / 0.7)) for z in (scores[0], scores[-1]))
    return float(np.abs(p - q).sum() / 2)


def drawn_pairs(
    model: PoEModel,
    prompt: list[int],
    mode: str,
    sampling: SamplingOptions,
    trials: int,
    **options,
) -> dict[tuple[int, int], int]:
    """How often each pair of first two tokens is drawn, by many sequences at a time."""
    chosen, batch = make_mode(model, mode, ModeOptions(**options)), Batch()
    state = DecodingState(model)
    prefill(state, prompt[:-1], model.poe_n_stages - 1)
    drawn: dict[int, list[int]] = {i: [] for i in range(trials)}
    for i in range(trials):
        sampler = Sampler(replace(sampling, seed=i))
        # Three, so that the second is not always the last of a round.
        sequence = DecodingSequence(
            model, prompt, chosen, max_tokens=3, sampler=sampler, state=state.fork()
        )
        batch.add(i, sequence.steps())
        while len(batch) > (40 if i < trials - 1 else 0):
            for event in batch.run():
                assert event.error is None
                if event.token:
                    drawn[event.name].append(event.token.token)
    pairs = Counter((first, second) for first, second, _ in drawn.values())
    return dict(pairs)


def chi_squared(
    model: PoEModel,
    prompt: list[int],
    sampling: SamplingOptions,
    seen: dict[tuple[int, int], int],
    width: int,
) -> tuple[float, int]:
    """The statistic of `seen` against the full model's own distribution, and its cells."""
    sampler, trials = Sampler(sampling), sum(seen.values())

    def distribution(tokens: list[int]) -> dict[int, float]:
        scores = model(mx.array([tokens]))[0, -1:]
        context = sampler.context(tokens, len(prompt), scores.shape[-1], len(prompt) + 2)
        probs = choose_from(scores, [sampler.choice(DRAFT, len(tokens), context)])["q"][0]
        return {int(t): probs[t].item() for t in np.argsort(np.array(probs))[-width:]}

    statistic, cells, left = 0.0, 0, dict(seen)
    for first, p in distribution(prompt).items():
        for second, q in distribution([*prompt, first]).items():
            expected = trials * p * q
            cells += 1
            statistic += (left.pop((first, second), 0) - expected) ** 2 / expected
    assert not left, "a token outside the filters was drawn"
    return statistic, cells


@settings(max_examples=3)
@given(data=st.data())
def test_modes_share_one_state_and_switch_at_any_time(data):
    """A talk that changes its mode at every turn: each turn equals one from a fresh state."""
    name = data.draw(st.sampled_from(["flat-d8", "gqa-logop-d8", "stage-on-flat"]))
    model, _ = fixture(name)
    state = DecodingState(model, slack=24, max_pending=24)
    source, text = goldens(name)["long.tokens"][0].tolist(), []
    for _ in range(data.draw(st.integers(2, 4))):
        text = text + source[: data.draw(st.integers(1, 160))]
        mode = data.draw(st.sampled_from(list(MODES)))
        options = {}
        if "p99_bounds" in MODES[mode]:
            options["p99_bounds"] = [data.draw(st.sampled_from([0.1, 0.5]))] * (
                model.poe_n_stages - 1
            )
        if mode == "stage":
            options["stage"] = data.draw(st.integers(0, model.poe_n_stages - 1))
        count = data.draw(st.integers(1, 35))
        ours = run(model, text, mode, count, state=state, **options)
        assert [(d.token, d.stage) for d in ours] == [
            (d.token, d.stage) for d in run(model, text, mode, count, **options)
        ]
        text = text + ids(ours)
        held = state.tokens
        assert held == text[: len(held)] and len(held) >= len(text) - 1


@pytest.mark.parametrize("waiting", [39, 40, 81])
@pytest.mark.parametrize("mode", MODES)
def test_any_number_of_positions_may_be_pending(mode, waiting):
    """A stage catches up by itself at `max_pending`; no mode may depend on whether it just has."""
    model, _ = fixture("flat-d8")
    source = goldens("flat-d8")["long.tokens"][0].tolist()
    options = {"p99_bounds": [0.3] * 3} if "p99_bounds" in MODES[mode] else {}
    prompt = source[: waiting + 1]
    expected = run(model, prompt, mode, 8, **options)
    # Read by the prompt's own chunks, and left behind by a shallower mode.
    for shallow in (None, "stage"):
        state = DecodingState(model, slack=24, max_pending=40)
        if shallow:
            set_depth(state, 0)
            prefill(state, prompt[:-1], 0)
        chosen = make_mode(model, mode, ModeOptions(**options))
        decoded = list(
            decode(model, prompt, chosen, max_tokens=8, state=state, prefill_step_size=40)
        )
        assert [(d.token, d.stage) for d in decoded] == [(d.token, d.stage) for d in expected]


def test_stopping_early_leaves_just_what_was_taken():
    model, _ = fixture("flat-d8")
    prompt, state = prompts("flat-d8")[0], DecodingState(model)
    mode = make_mode(model, "speculative", ModeOptions(num_draft_tokens=6))
    taken = []
    stream = decode(model, prompt, mode, max_tokens=40, state=state)
    for decoded in stream:
        taken.append(decoded.token)
        if len(taken) == 5:
            break
    stream.close()
    assert state.tokens == (prompt + taken)[: state.length]
    assert state.length >= len(prompt) + 4


@pytest.mark.parametrize("name", ["flat-d8", "gqa-logop-d8"])
def test_shallow_modes_leave_the_deeper_stages_empty(name):
    model, _ = fixture(name)
    state = DecodingState(model)
    run(model, prompts(name)[1], "stage", state=state, stage=1)
    assert state.filled[2:] == [0, 0] and state.positions_run[2:] == [0, 0]


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("fast", {}, "mode 'fast' is not one of full"),
        ("full", {"stage": 1}, "stage belongs to mode stage, not to full"),
        ("stage", {"stage": 7}, "stage 7: this model has stages 0 to 3"),
        ("stage", {"stage": -1}, "stage -1"),
        ("prefix", {"max_stages": 0}, "max_stages 0"),
        ("compose", {"stages": []}, "at least one stage"),
        ("compose", {"stages": [0, 0]}, "twice"),
        ("compose", {"stages": [0, 4]}, "stage 4"),
        ("compose", {"stages": [0, 1], "stage_weights": [1.0]}, "1 weights for 2 stages"),
        ("compose", {"stages": [0, 1], "stage_weights": [1.0, -1.0]}, "more than 0"),
        ("wand", {}, "no calibration"),
        ("certified", {}, "certified no longer exists: use speculative"),
        ("wand", {"p99_bounds": [1.0]}, "1 given, but this model has 3"),
        ("wand", {"p99_bounds": [1.0, 1.0, -1.0]}, "at least 0"),
        ("wand", {"p99_bounds": [1.0] * 3, "safety": -1.0}, "safety -1.0"),
        ("wand", {"p99_bounds": [1.0] * 3, "exit_stages": [5]}, "exit stage 5"),
        ("speculative", {"draft_stage": 4}, "draft_stage 4"),
        ("speculative", {"num_draft_tokens": 0}, "num_draft_tokens 0"),
    ],
)
def test_senseless_requests_are_named(mode, options, message):
    model, _ = fixture("flat-d8")
    with pytest.raises(RequestError, match=message):
        make_mode(model, mode, ModeOptions(**options))


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([], 5, "empty"),
        ([1], 0, "max_tokens 0"),
        ([320], 5, "token id 320"),
        ([-1], 5, "token id -1"),
    ],
)
def test_senseless_prompts_are_named(prompt, count, message):
    model, _ = fixture("flat-d8")
    with pytest.raises(RequestError, match=message):
        run(model, prompt, "full", count)


def test_more_drafts_than_a_state_can_roll_back_are_refused():
    model, _ = fixture("flat-d8")
    with pytest.raises(RequestError, match="the 4 positions"):
        run(model, [1], "speculative", state=DecodingState(model, slack=4), num_draft_tokens=5)


def test_exit_margins_add_up_the_bounds_that_remain():
    model, _ = fixture("flat-d8")
    assert exit_margins(model, [7.0, 3.0, 2.0], 0.5) == [6.0, 2.5, 1.0]
    assert exit_margins(model, [1.0, INF, 2.0], 0.0) == [INF, INF, 0.0]
