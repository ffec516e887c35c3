"""What is told of a choice (alternatives, the prompt's own tokens) and asked of it (biases, two
penalties): the same in every mode, alone and together, as from a plain forward."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import mlx.core as mx
import pytest
from conftest import fixture
from test_scheduler import STORY, models, text, tokens_of

from cognica_mlx.decoding.choosing import DRAFT, choose_from, extended
from cognica_mlx.decoding.modes import make_mode
from cognica_mlx.decoding.requests import Request, Score
from cognica_mlx.decoding.sampling import Sampler, SamplingOptions
from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.decoding.single import Single, drive
from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.errors import RequestError
from cognica_mlx.network.model import log_softmax
from mlx_poe import batch_generate, stream_generate
from mlx_poe.commands.generate import main
from mlx_poe.engine import Engine
from mlx_poe.generation.responses import GenerationResponse

base, tokenizer = fixture("poe-tiny")
PENALTIES = {"presence_penalty": 0.9, "frequency_penalty": 0.6}
MODES: list[dict[str, Any]] = [
    {},
    {"mode": "stage", "stage": 1},
    {"mode": "prefix", "max_stages": 3},
    {"mode": "compose", "stages": [0, 3]},
    {"mode": "wand"},
    {"mode": "speculative", "num_draft_tokens": 4},
]


def stream(prompt: Any = STORY, model: str = "base", **options: Any) -> list[GenerationResponse]:
    options = {"max_tokens": 24, **options}
    return list(stream_generate(models()[model], tokenizer, prompt, **options))


def expected(tokens: list[int], mode: dict[str, Any], stage: int) -> mx.array:
    """Log-probabilities (T, V) by a plain forward, of a mode whose token left at `stage`."""
    ids = mx.array([tokens])
    own = [log_softmax(logits)[0] for logits in base.forward_all_stages(ids)]
    if "stages" in mode:
        return log_softmax(sum(own[k] for k in mode["stages"]) / len(mode["stages"]))
    exact = stage == 3 or mode.get("mode") == "speculative"
    return log_softmax(base(ids))[0] if exact else own[stage]


def by_hand(prompt: list[int], count: int, bias: dict[int, float], **penalties: float) -> list[int]:
    """Greedy tokens from plain forwards, by the formula in OpenAI's documentation."""
    made: list[int] = []
    while len(made) < count:
        scores = base(mx.array([[*prompt, *made]]))[0, -1].tolist()
        for token, value in bias.items():
            scores[token] += value
        for token, seen in Counter(made).items():
            scores[token] -= seen * penalties["frequency_penalty"] + penalties["presence_penalty"]
        made.append(max(range(len(scores)), key=scores.__getitem__))
    return made


@pytest.mark.parametrize("mode", [MODES[0], MODES[5]], ids=["full", "speculative"])
def test_biases_and_penalties_are_those_of_the_formula(mode):
    prompt = tokenizer.encode(STORY)
    plain = tokens_of(stream())
    bias = {plain[0]: -100.0, plain[3]: 2.5}
    expected = by_hand(prompt, 24, bias, **PENALTIES)
    assert expected != plain
    options = {"logit_bias": bias, **PENALTIES, **mode}
    assert tokens_of(stream(**options)) == expected
    (together, _) = batch_generate(
        base, tokenizer, [STORY, text(40)], max_tokens=24, **options
    ).responses
    assert tokens_of(together) == expected


@pytest.mark.parametrize("reply", [(), (5, 6, 5), tuple(range(40))], ids=len)
def test_rows_scored_together_see_what_they_see_one_by_one(reply):
    """A context goes on in the graph as one of known tokens does on the host."""
    options = {"logit_bias": {3: 1.5, 60: -2.0}, "repetition_penalty": 1.3, **PENALTIES}
    sampler = Sampler(SamplingOptions(temp=1, repetition_context_size=12, **options))
    scores = mx.random.normal((4, 64), key=mx.random.key(len(reply)))
    text, drafts = [1, 2, *reply], [5, 9, 9]
    contexts = [sampler.context(text, 2, 64, 80)]
    for token in drafts:
        contexts.append(extended(contexts[-1], mx.array([[token]])))
    joined = {name: mx.concatenate([c[name] for c in contexts]) for name in contexts[0]}
    together = choose_from(scores, [sampler.choice(DRAFT, 9, joined, rows=4)])["q"]
    for row in range(4):
        known = sampler.context([*text, *drafts[:row]], 2, 64, 80)
        alone = choose_from(scores[row : row + 1], [sampler.choice(DRAFT, 9, known)])["q"]
        assert mx.array_equal(together[row : row + 1], alone)
        by_rule = scores[row].tolist()
        by_rule[3], by_rule[60] = by_rule[3] + 1.5, by_rule[60] - 2
        for token in {*[*text, *drafts[:row]][-12:]}:
            by_rule[token] *= 1.3 if by_rule[token] < 0 else 1 / 1.3
        for token, count in Counter([*reply, *drafts[:row]]).items():
            by_rule[token] -= 0.6 * count + 0.9
        assert alone[0].tolist() == pytest.approx(mx.softmax(mx.array(by_rule)).tolist(), rel=1e-5)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.get("mode", "full"))
def test_alternatives_are_the_best_where_the_token_is_from(mode):
    responses = stream(top_logprobs=5, **mode)
    tokens = [*tokenizer.encode(STORY), *tokens_of(responses)]
    first = len(tokens) - len(responses) - 1
    by_stage = {r.stage: expected(tokens, mode, r.stage) for r in responses}
    for i, response in enumerate(responses, first):
        logprobs = by_stage[response.stage][i]
        best = mx.argsort(-logprobs)[:5]
        told = dict(response.top_logprobs)
        assert list(told) == best.tolist()
        assert list(told.values()) == pytest.approx(logprobs[best].tolist(), abs=2e-4)
        assert response.top_logprobs[0] == (response.token, pytest.approx(response.logprob))


def test_what_a_form_excludes_is_no_alternative():
    responses = stream(top_logprobs=4, regex="(yes|no), (12|13)", max_tokens=9)
    assert any(r.forced for r in responses)
    for response in responses:
        assert all(logprob > -50 for _, logprob in response.top_logprobs)
        if response.forced:
            assert response.top_logprobs == ((response.token, 0.0),)
    speculative = stream(
        top_logprobs=4, regex="(yes|no), (12|13)", max_tokens=9, mode="speculative"
    )
    for one, other in zip(responses, speculative, strict=True):
        assert dict(one.top_logprobs) == pytest.approx(dict(other.top_logprobs), abs=2e-4)


def scores_of(responses: list[GenerationResponse]) -> list[float]:
    assert all(response.prompt_logprobs is None for response in responses[1:])
    return [logprob for logprob, _ in responses[0].prompt_logprobs or ()]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.get("mode", "full"))
@pytest.mark.parametrize("length", [1, 2, 200])
def test_a_prompts_tokens_are_scored_as_by_a_plain_forward(mode, length):
    prompt = text(length)
    stage = {"stage": 1, "prefix": 2}.get(mode.get("mode", ""), 3)
    logprobs = expected(prompt, mode, stage)
    follow = [logprobs[i, token].item() for i, token in enumerate(prompt[1:])]
    responses = stream(prompt, max_tokens=3, top_logprobs=2, prompt_logprobs=True, **mode)
    assert scores_of(responses) == pytest.approx(follow, abs=2e-4)
    for row, (_, top) in enumerate(responses[0].prompt_logprobs or ()):
        assert top[0][0] == mx.argmax(logprobs[row]).item() and len(top) == 2
    assert tokens_of(responses) == tokens_of(stream(prompt, max_tokens=3, **mode))


@pytest.mark.parametrize("model", ["chat", "both"])
def test_a_prompt_is_scored_by_the_model_that_is_asked(model):
    prompt = text(150)
    logits = models()[model](mx.array([prompt]))
    follow = mx.take_along_axis(log_softmax(logits)[0, :-1], mx.array(prompt[1:])[:, None], -1)
    responses = stream(prompt, model, max_tokens=1, prompt_logprobs=True, mode="speculative")
    assert scores_of(responses) == pytest.approx(follow[:, 0].tolist(), abs=2e-4)


def test_a_prompt_is_scored_whole_whatever_is_held_of_it():
    prompt = text(200)
    wanted = scores_of(stream(prompt, prompt_logprobs=True))
    state = DecodingState(base)
    stream(prompt, state=state)
    again = stream(prompt, state=state, prompt_logprobs=True)
    assert scores_of(again) == pytest.approx(wanted, abs=2e-4)
    assert again[0].cached_tokens == 0
    with Engine(base, tokenizer) as engine:
        list(engine.submit(prompt, max_tokens=4))
        others = [engine.submit(text(60, start), max_tokens=30) for start in range(3)]
        found = list(engine.submit(prompt, max_tokens=4, prompt_logprobs=True))
        assert found[0].cached_tokens == 0
        assert scores_of(found) == pytest.approx(wanted, abs=2e-4)
        for other in others:
            other.cancel()


def test_offsets_say_where_each_tokens_text_begins():
    for options in ({}, {"stop": ["mou", "se w"]}, {"temp": 1.5, "seed": 3}):
        responses = stream(max_tokens=40, **options)
        whole = "".join(r.text for r in responses)
        for response in responses:
            piece = tokenizer.decode([response.token])
            if "\ufffd" not in piece and response.token not in tokenizer.eos_token_ids:
                said = whole[response.text_offset :][: len(piece)]
                assert said == piece[: len(whole) - response.text_offset]


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"logit_bias": {9999: 1.0}}, "token id 9999 is outside"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias: .* are not all token ids"),
        ({"logit_bias": [1]}, "logit_bias takes numbers by token id"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias of token 5: nan"),
        ({"presence_penalty": float("inf")}, "presence_penalty inf"),
        ({"frequency_penalty": "x"}, "frequency_penalty takes numbers"),
        ({"top_logprobs": 101}, "top_logprobs 101 is not between 0 and 100"),
        ({"top_logprobs": -1}, "top_logprobs -1"),
        ({"prompt_logprobs": 3}, "prompt_logprobs must be True or False"),
    ],
)
def test_refusals(options, problem):
    with pytest.raises(RequestError, match=problem):
        stream(**options)
    with pytest.raises(RequestError, match=problem):
        batch_generate(base, tokenizer, [STORY], **options)


def test_the_command_shows_alternatives_and_takes_penalties(capsys):
    flags = ["--prompt", STORY, "-m", "6", "--dtype", "float32"]
    assert main([*flags, "--json", "--top-logprobs", "2", "--frequency-penalty", "0.7"]) == 0
    shown = json.loads(capsys.readouterr().out)["tokens"]
    expected = stream(max_tokens=6, top_logprobs=2, frequency_penalty=0.7)
    assert [token["token"] for token in shown] == tokens_of(expected)
    assert [[pair[0] for pair in token["top_logprobs"]] for token in shown] == [
        [token for token, _ in response.top_logprobs] for response in expected
    ]
    assert main([*flags, "--top-logprobs", "2"]) == 2
    assert "--top-logprobs needs --json" in capsys.readouterr().err


def test_no_more_rows_are_scored_at_once_than_a_state_holds():
    rows: list[int] = []

    class Watching(Single):
        def answer(self, request: Request) -> Any:
            if isinstance(request, Score):
                rows.append(request.rows)
            return super().answer(request)

    prompt, mode = text(300), make_mode(base)
    sequence = DecodingSequence(base, prompt, mode, max_tokens=1, score_prompt=True)
    list(drive(sequence.steps(), Watching()))
    assert rows == [128, 128, 43, 1]
    assert sequence.step_size > sequence.state.slack == 128
