"""One request, wherever it comes in: the same reply, and the same words for what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import fixture
from servers import RunningServer

from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.errors import RequestError
from mlx_poe import batch_generate, stream_generate
from mlx_poe.commands.generate import main
from mlx_poe.engine import Engine
from mlx_poe.generation.request import read_request
from mlx_poe.generation.responses import GenerationResponse
from mlx_poe.loading.specialists import Specialists

base, tokenizer = fixture("poe-tiny")
STORY = "Once there was a little mouse who lived in a big house and"
NAMES = {"temp": "temperature", "top_logprobs": "logprobs"}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(base, tokenizer) as engine:
        yield engine


def body(prompt: Any, options: dict[str, Any]) -> dict[str, Any]:
    fields = {NAMES.get(name, name): value for name, value in options.items()}
    return {"model": "poe-tiny", "prompt": prompt, "token_stages": True, **fields}


def from_file(tmp_path: Any, prompt: Any, options: dict[str, Any]) -> tuple[int, Any]:
    """The exit status of `--prompts`, and where its output is."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    kind = "prompt" if isinstance(prompt, str) else "tokens"
    source.write_text(json.dumps({kind: prompt, **options}))
    flags = ["--prompts", str(source), "--output", str(output), "--dtype", "float32"]
    return main([*flags, "--no-fallback"]), output


def told(responses: list[GenerationResponse]) -> tuple[list[int], str, str | None]:
    text = "".join(response.text for response in responses)
    return [response.token for response in responses], text, responses[-1].finish_reason


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (STORY, {}),
        ([2039, 5, 6, 7], {"mode": "stage", "stage": 1}),
        (STORY, {"mode": "speculative", "num_draft_tokens": 4, "temp": 0.8, "seed": 7}),
        (STORY, {"mode": "compose", "stages": [0, 3], "stage_weights": [1, 0.5]}),
        (STORY, {"stop": [" the", "."]}),
        (STORY, {"regex": "( [a-z]+){3}", "repetition_penalty": 1.2, "top_k": 5}),
        (STORY, {"logit_bias": {"300": -100}, "presence_penalty": 0.5, "mode": "wand"}),
    ],
    ids=str,
)
def test_a_request_gets_the_same_reply_everywhere(server, engine, tmp_path, prompt, options):
    options = {"max_tokens": 10, **options}
    expected = told(list(stream_generate(base, tokenizer, prompt, **options)))
    assert told(batch_generate(base, tokenizer, [prompt], **options).responses[0]) == expected
    assert told(list(engine.submit(prompt, **options))) == expected
    status, output = from_file(tmp_path, prompt, options)
    record = json.loads(output.read_text())
    tokens = [each["token"] for each in record["tokens"]]
    assert status == 0 and (tokens, record["text"], record["finish_reason"]) == expected
    assert record["fell_back"] is None and record["parked"] is None
    status, response, _ = server.ask(
        "/v1/completions", body(prompt, {**options, "no_fallback": True})
    )
    (choice,) = response["choices"]
    assert status == 200 and (choice["text"], choice["finish_reason"]) == expected[1:]
    ids = [each["id"] for each in choice["token_stages"]]
    # It leaves out the tokens of stop strings and the one that ends a reply.
    assert ids == expected[0][: len(ids)] and len(ids) >= len(expected[0]) - 3


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"mode": "deep"}, "mode 'deep' is not one of full, stage, "),
    ({"mode": ["full"]}, "mode ['full'] is not one of full, stage, "),
    ({"mode": "stage", "stage": 9}, "stage 9: this model has stages 0 to 3"),
    ({"mode": "stage", "stage": True}, "stage takes whole numbers, not True"),
    ({"stage": 1}, "stage belongs to mode stage, not to full"),
    ({"mode": "compose", "stages": [0, True]}, "stages takes whole numbers, not True"),
    ({"mode": "compose", "stages": [0.5]}, "stages takes whole numbers, not 0.5"),
    ({"mode": "compose", "stages": "0,1"}, "stages takes a list of numbers, not '0,1'"),
    ({"mode": "compose", "stages": {"0": 1}}, "stages takes a list of numbers, not {'0': 1}"),
    ({"mode": "compose", "stage_weights": [[1]]}, "stage_weights takes numbers, not [1]"),
    ({"mode": "speculative", "draft_bits": 4.0}, "draft_bits takes whole numbers, not 4.0"),
    ({"mode": "speculative", "draft_bits": True}, "draft_bits takes whole numbers, not True"),
    ({"mode": "speculative", "draft_bits": "fp9"}, "draft_bits 'fp9': choose from "),
    ({"mode": "speculative", "draft_head": ["base"]}, "draft_head must be text, not ['base']"),
    ({"mode": "speculative", "draft_lookup": 1}, "draft_lookup must be True or False, not 1"),
    ({"no_fallback": "yes"}, "no_fallback must be True or False, not 'yes'"),
    ({"top_k": -1}, "top_k -1 is negative (0 turns it off)"),
    ({"mode": "wand", "p99_bounds": [10**309, 1, 1]}, "p99_bounds 1000"),
    ({"mode": "wand", "safety": 10**309}, "safety 1000"),
    ({"top_p": "most"}, "top_p takes numbers, not 'most'"),
    ({"top_p": 1.5}, "top_p 1.5 is not between 0 and 1"),
    ({"temp": 1e-9}, "temp 1e-09 is neither 0 (greedy) nor between 1e-06 and 1000000.0"),
    ({"repetition_context_size": 0}, "repetition_context_size 0 is below 1"),
    ({"stop": 3}, "stop: a stop string is text, not int"),
    ({"stop": ["a", 3]}, "stop: a stop string is text, not int"),
    ({"stop": {"a": "b"}}, "stop: a stop string is text, not dict"),
    ({"stop": [""]}, "stop: a stop string is empty"),
    ({"stop": "\ud83d"}, "stop: a stop string contains '\\ud83d', which is not a character "),
    ({"regex": 5}, "regex: a grammar is text, not int"),
    ({"regex": "a", "grammar": 'start: "a"'}, "regex and grammar cannot be combined: give one"),
]


@pytest.mark.parametrize(("options", "problem"), WRONG, ids=str)
def test_what_is_wrong_is_said_in_the_same_words_everywhere(
    server, engine, tmp_path, capsys, options, problem
):
    with pytest.raises(RequestError) as caught:
        list(stream_generate(base, tokenizer, "Hi", **options))
    message = str(caught.value)
    assert message.startswith(problem) and "\n" not in message
    with pytest.raises(RequestError) as caught:
        batch_generate(base, tokenizer, ["Hi"], **options)
    assert str(caught.value) == f"prompt 0: {message}"
    with pytest.raises(RequestError) as caught:
        engine.submit("Hi", **options)
    assert str(caught.value) == message
    status, response, _ = server.ask("/v1/completions", body("Hi", options))
    assert (status, response["error"]["message"]) == (400, message)
    # The field at fault is named, too.
    fields = [NAMES.get(name, name) for name in options]
    assert response["error"]["param"] in fields
    if "no_fallback" not in options:  # a line of a file cannot decide that
        assert from_file(tmp_path, "Hi", options)[0] == 2
        assert capsys.readouterr().err.endswith(f"line 1: {message}\n")


@pytest.mark.parametrize("name", ["max_tokens", "prefill_step_size"])
@pytest.mark.parametrize("value", [2.5, "many", True, [1]])
def test_limits_are_whole_numbers(name, value):
    with pytest.raises(RequestError, match=f"{name} takes whole numbers, not "):
        read_request(tokenizer, "Hi", {name: value})


@pytest.mark.parametrize(
    ("specialist", "weights", "problem"),
    [
        (5, None, "specialist takes a name, or a list of names, not 5"),
        ([5], None, "specialist takes a name, or a list of names, not"),
        ({"a": 1}, None, "specialist takes a name, or a list of names, not"),
        (["a", "b"], "1,2", "weights takes a list of numbers, not '1,2'"),
        (["a", "b"], [1, None], "weights takes numbers, not None"),
    ],
)
def test_a_specialist_is_named(engine, tmp_path, capsys, specialist, weights, problem):
    with pytest.raises(RequestError) as caught:
        engine.submit("Hi", specialist=specialist, weights=weights)
    assert str(caught.value).startswith(problem)
    assert from_file(tmp_path, "Hi", {"specialist": specialist, "weights": weights})[0] == 2
    assert capsys.readouterr().err.endswith(f"line 1: {caught.value}\n")


def test_a_token_that_is_true_is_no_token():
    with pytest.raises(RequestError, match="whole numbers only"):
        read_request(tokenizer, [5, True], {})


def test_a_request_is_checked_without_a_sequence_and_makes_as_many_as_it_is_asked_for(monkeypatch):
    request = read_request(tokenizer, STORY, {"max_tokens": 3, "regex": "[a-z ]+"}).on(base)
    first, second = request.sequence(), request.sequence()
    assert first.state is not second.state and first.constraint is not second.constraint
    assert first.text == second.text == request.tokens
    monkeypatch.setattr(DecodingSequence, "__init__", None)
    with pytest.raises(RequestError, match="max_tokens 0"):
        read_request(tokenizer, STORY, {"max_tokens": 0}).on(base)
    with pytest.raises(RequestError, match="token id 2048"):
        read_request(tokenizer, STORY, {"logit_bias": {2048: 1}}).on(base)


def test_costs_are_looked_up_once_and_only_for_a_mode_that_may_fall_back():
    asked: list[Any] = []

    def costs(*about: Any) -> None:
        asked.append(about)

    for options in ({}, {"mode": "wand", "no_fallback": True}, {"mode": "stage"}):
        read_request(tokenizer, STORY, {"costs": costs, **options}).on(base)
    assert not asked
    read_request(tokenizer, STORY, {"costs": costs, "mode": "wand"}).on(base)
    assert len(asked) == 1


def test_one_specialist_or_several_are_chosen_by_name():
    attached = Specialists(base)
    for name in ("chat", "math"):
        attached.attach(name, f"poe-tiny-{name}")
    assert attached.choose(None) is base and attached.choose("chat") is attached.use("chat")
    assert attached.choose(["chat", "math"], [1, 2]).poe_n_stages == 6
    with pytest.raises(RequestError, match="weights need several specialists"):
        attached.choose("chat", [1])


def test_the_server_reads_the_old_names_of_no_fallback_too(server: RunningServer):
    for name in ("no_fallback", "no_park"):
        options = {"mode": "speculative", "max_tokens": 2, name: True}
        status, response, _ = server.ask("/v1/completions", body("Hi", options))
        ours = response["usage"]["poe"]
        assert (status, ours["fell_back"], ours["parked"]) == (200, None, None)
