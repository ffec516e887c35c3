"""The server as the `openai` client sees it: replies are those of `stream_generate`."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from chats import FUNCTIONS
from conftest import fixture
from test_scheduler import STORY, TALK, models, text

from mlx_poe import stream_generate
from mlx_poe.generation.responses import GenerationResponse

if TYPE_CHECKING:
    import openai

tokenizer = fixture("poe-tiny")[1]
NAMES = {"base": "poe-tiny", "chat": "poe-tiny-chat", "math": "poe-tiny-math", "both": "both"}
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="session")
def client(server):
    import openai  # here, as it takes seconds, and most workers do not need it

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def alone(prompt: Any, model: str = "base", **options: Any) -> list[GenerationResponse]:
    return list(stream_generate(models()[model], tokenizer, prompt, **options))


def said(responses: list[GenerationResponse]) -> str:
    return "".join(response.text for response in responses)


def chat(client: openai.OpenAI, model: str = "chat", messages: Any = TALK, **options: Any) -> Any:
    return client.chat.completions.create(model=NAMES[model], messages=messages, **options)


def streamed(client: openai.OpenAI, *args: Any, **options: Any) -> tuple[list[Any], Any]:
    """The chunks of a streamed chat with choices, and the usage at the end."""
    chunks = list(
        chat(client, *args, stream=True, stream_options={"include_usage": True}, **options)
    )
    assert not chunks[-1].choices and all(c.choices and c.usage is None for c in chunks[:-1])
    assert len({(c.id, c.model, c.created, c.object) for c in chunks}) == 1
    return chunks[:-1], chunks[-1].usage


CHATS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("chat", {}, {}),
    ("math", {}, {"mode": "speculative", "num_draft_tokens": 5}),
    ("both", {}, {"mode": "stage", "stage": 1}),
    ("chat", {"temperature": 1.1, "seed": -5, "top_p": 0.9}, {"min_p": 0.02, "top_k": 50}),
    ("chat", {"presence_penalty": 0.4, "frequency_penalty": 0.5}, {"repetition_penalty": 1.0}),
    ("chat", {"logit_bias": {"280": -100}}, {"mode": "wand", "safety": 2.0}),
    ("chat", {"stop": [" is", "Tok"]}, {}),
    ("chat", {"stop": "capital of"}, {"mode": "speculative"}),
    ("chat", {"max_completion_tokens": 3}, {"regex": "[a-z]{2,9} [a-z]+"}),
    ("chat", {}, {"grammar": 'start: "yes" | "no"'}),
    ("chat", {"response_format": {"type": "json_object"}}, {}),
]


def as_options(about: dict[str, Any], own: dict[str, Any], formal: bool) -> dict[str, Any]:
    """The same request for `stream_generate`."""
    options = {"repetition_penalty": 1.0 if formal else 1.15, "max_tokens": 24, **about, **own}
    names = {"temperature": "temp", "max_completion_tokens": "max_tokens"}
    options = {names.get(name, name): value for name, value in options.items()}
    if "seed" in options:
        options["seed"] %= 2**64
    if options.pop("response_format", None):
        options["json_schema"] = {}
    return options


@pytest.mark.parametrize("model, about, own", CHATS)
def test_a_reply_is_the_one_that_generate_gives(client, model, about, own):
    formal = bool({"regex", "grammar"} & own.keys() or "response_format" in about)
    expected = alone(TALK, model, **as_options(about, own, formal))
    about = {"max_completion_tokens": 24, **about, "extra_body": {**own, "no_fallback": True}}
    reply = chat(client, model, **about)
    (choice,) = reply.choices
    assert choice.message.content == said(expected)
    assert choice.message.role == "assistant" and not choice.message.tool_calls
    assert choice.finish_reason == expected[-1].finish_reason
    assert reply.usage.completion_tokens == len(expected)
    assert reply.usage.prompt_tokens == expected[0].prompt_tokens
    assert reply.usage.total_tokens == len(expected) + expected[0].prompt_tokens
    drafts = reply.usage.completion_tokens_details
    assert drafts.accepted_prediction_tokens == sum(r.from_draft for r in expected)
    rejected = expected[-1].drafted_tokens - drafts.accepted_prediction_tokens
    assert drafts.rejected_prediction_tokens == rejected
    ours = reply.usage.poe
    asked = [r.stage for r in expected if not r.forced]
    assert ours["tokens_per_stage"] == [
        asked.count(k) for k in range(len(ours["tokens_per_stage"]))
    ]
    assert ours["forced_tokens"] == len(expected) - len(asked)
    if asked:
        assert ours["mean_depth"] == pytest.approx(sum(asked) / len(asked) + 1)
    assert (ours["mode"], ours["fell_back"]) == (own.get("mode", "full"), None)

    chunks, usage = streamed(client, model, **about)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == said(expected)
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(reasons) - 1) + [expected[-1].finish_reason]
    assert usage.completion_tokens == len(expected) and usage.poe == ours


def test_the_default_is_greedy_and_512_tokens_long(client):
    messages = [{"role": "user", "content": "Tell me about Kenya."}]
    expected = alone(messages, "chat", repetition_penalty=1.15, max_tokens=512)
    assert chat(client, "chat", messages).choices[0].message.content == said(expected)


def test_a_schema_holds_and_tells_what_was_forced(client):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    reply = chat(client, response_format=form)
    assert 0 <= json.loads(reply.choices[0].message.content)["n"] <= 99
    assert reply.usage.poe["forced_tokens"] > 2


def test_log_probabilities_are_those_of_the_tokens(client):
    expected = alone(TALK, "chat", repetition_penalty=1.15, top_logprobs=3)
    about = {"logprobs": True, "top_logprobs": 3, "extra_body": {"token_stages": True}}
    (choice,) = chat(client, **about).choices
    chunks, _ = streamed(client, **about)
    parts = [part for c in chunks for part in (c.choices[0].logprobs or choice.logprobs).content]
    told = expected[:-1]  # not the token that ends the reply
    for entries in (choice.logprobs.content, parts):
        assert [bytes(e.bytes) for e in entries] == [tokenizer.token_bytes(r.token) for r in told]
        assert "".join(e.token for e in entries) == said(expected)
        for entry, response in zip(entries, told, strict=True):
            assert entry.logprob == pytest.approx(response.logprob, abs=2e-4)
            best = [(t.token, t.logprob) for t in entry.top_logprobs]
            known = [(tokenizer.decode([t]), p) for t, p in response.top_logprobs]
            assert [t for t, _ in best] == [t for t, _ in known]
            assert [p for _, p in best] == pytest.approx([p for _, p in known], abs=2e-4)
    stages = [s for c in chunks for s in c.choices[0].token_stages]
    assert choice.token_stages == stages
    assert [(s["id"], s["stage"]) for s in stages] == [(r.token, r.stage) for r in told]
    assert not chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs


def test_tokens_of_a_stop_string_are_not_told(client):
    stop = [" of Japan"]
    (choice,) = chat(client, logprobs=True, stop=stop).choices
    assert choice.message.content == "The capital"
    assert [entry.token for entry in choice.logprobs.content] == ["The", " capital"]


def test_several_choices_have_seeds_of_their_own(client):
    messages = [{"role": "user", "content": "Tell me a story about a fox."}]
    options: dict[str, Any] = {"messages": messages, "temperature": 2, "max_tokens": 9}
    reply = chat(client, n=3, seed=11, **options)
    own = [chat(client, seed=11 + i, **options).choices[0].message.content for i in range(3)]
    assert [choice.message.content for choice in reply.choices] == own
    assert len(set(own)) > 1
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert reply.usage.prompt_tokens == len(tokenizer.apply_chat_template(messages))
    chunks, usage = streamed(client, n=3, seed=11, **options)
    texts = ["", "", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == own and usage.completion_tokens == reply.usage.completion_tokens


# --- tools ----------------------------------------------------------------------------------------

CHILE = [{"role": "user", "content": "What is the capital of Chile?"}]
TOOLS: Any = [{"type": "function", "function": function} for function in FUNCTIONS]
NAMES["tool"] = "poe-tiny-tool"


@pytest.mark.parametrize("choice", ["auto", "required", "by name"])
@pytest.mark.parametrize("mode", ["full", "speculative"])
def test_a_call_is_the_same_streamed_and_not(client, choice, mode):
    named = {"type": "function", "function": {"name": "get_capital"}}
    about: dict[str, Any] = {
        "tools": TOOLS,
        "tool_choice": named if choice == "by name" else choice,
        "extra_body": {"mode": mode, "no_park": True},
    }
    (whole,) = chat(client, "tool", CHILE, **about).choices
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    (call,) = whole.message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_capital")
    assert json.loads(call.function.arguments) == {"country": "Chile"}
    chunks, _ = streamed(client, "tool", CHILE, **about)
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "tool_calls"
    parts = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
    assert re.fullmatch("call_[0-9a-f]{24}", parts[0].id) and parts[0].type == "function"
    assert [part.index for part in parts] == [0] * len(parts)
    assert "".join(part.function.name or "" for part in parts) == "get_capital"
    arguments = "".join(part.function.arguments or "" for part in parts)
    assert arguments == call.function.arguments
    assert not "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_no_call_where_there_must_be_none(client):
    reply = chat(client, "tool", CHILE, tools=TOOLS, tool_choice="none", max_tokens=12)
    assert reply.choices[0].message.content and not reply.choices[0].message.tool_calls


def test_a_call_that_is_cut_off_is_none(client):
    reply = chat(client, "tool", CHILE, tools=TOOLS, max_tokens=8)
    (choice,) = reply.choices
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)
    assert choice.message.content == ""


def test_a_history_with_a_call_is_read_in_the_models_own_layout(client, server):
    message = chat(client, "tool", CHILE, tools=TOOLS).choices[0].message
    history: list[Any] = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        CHILE[0],
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Santiago"},
        {"role": "user", "content": "Say it again."},
    ]
    call = '<functioncall> {"name": "get_capital", "arguments": \'{"country": "Chile"}\'}'
    plain = [
        {"role": "system", "content": "Be brief."},
        CHILE[0],
        {"role": "assistant", "content": call},
        {"role": "user", "content": "FUNCTION RESPONSE: Santiago\n\nSay it again."},
    ]
    reply = chat(client, "tool", history, max_tokens=9)
    expected = tokenizer.apply_chat_template(plain)
    assert reply.usage.prompt_tokens == len(expected)
    same = chat(client, "tool", plain, max_tokens=9)
    assert same.choices[0].message.content == reply.choices[0].message.content
    assert same.usage.prompt_tokens_details.cached_tokens == len(expected) - 1


# --- completions ----------------------------------------------------------------------------------


def complete(client: openai.OpenAI, prompt: Any, model: str = "base", **options: Any) -> Any:
    return client.completions.create(model=NAMES[model], prompt=prompt, **options)


PROMPTS = [STORY, text(30), [STORY, "The capital of France is"], [text(20), text(9, 3)]]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("echo", [False, True])
def test_prompts_of_every_kind(client, prompt, echo):
    each = (
        prompt if isinstance(prompt[0], (str, list)) and not isinstance(prompt, str) else [prompt]
    )
    expected = [alone(one, max_tokens=16) for one in each]
    texts = [
        (one if isinstance(one, str) else tokenizer.decode(one)) * echo + said(responses)
        for one, responses in zip(each, expected, strict=True)
    ]
    reply = complete(client, prompt, echo=echo)
    assert [choice.text for choice in reply.choices] == texts
    assert [choice.index for choice in reply.choices] == list(range(len(each)))
    assert reply.usage.prompt_tokens == sum(r[0].prompt_tokens for r in expected)
    parts = [""] * len(each)
    for chunk in complete(client, prompt, echo=echo, stream=True):
        parts[chunk.choices[0].index] += chunk.choices[0].text
    assert parts == texts


@pytest.mark.parametrize("prompt", ["The capital of France is", text(150)])
@pytest.mark.parametrize("model", ["base", "chat"])
def test_a_prompts_log_probabilities(client, prompt, model):
    expected = alone(prompt, model, max_tokens=2, top_logprobs=1, prompt_logprobs=True)
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    (choice,) = complete(client, prompt, model, echo=True, logprobs=1, max_tokens=2).choices
    told = choice.logprobs
    own = [
        None,
        *(lp for lp, _ in expected[0].prompt_logprobs or ()),
        *(r.logprob for r in expected),
    ]
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert told.token_logprobs[1:] == pytest.approx(own[1:], abs=2e-4)
    assert len(told.tokens) == len(ids) + 2 == len(told.top_logprobs) == len(told.text_offset)
    for token, offset in list(zip(told.tokens, told.text_offset, strict=True))[
        isinstance(prompt, str) :
    ]:
        if not token.startswith("bytes:"):
            assert choice.text[offset:].startswith(token)
    for token, logprob, top in list(
        zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True)
    )[1:]:
        assert top[token] == logprob == min(top.values()) or len(top) == 1
    # What lm-eval sums: the same without a reply, streamed, and whatever was read before.
    (bare,) = complete(client, prompt, model, echo=True, logprobs=1, max_tokens=0).choices
    assert bare.logprobs.token_logprobs == pytest.approx(told.token_logprobs[:-2], abs=2e-4)
    assert bare.finish_reason == "length" and choice.text.startswith(bare.text)
    usage = complete(client, prompt, model, echo=True, max_tokens=0).usage
    assert (usage.completion_tokens, usage.total_tokens) == (0, len(ids))
    chunks = list(complete(client, prompt, model, echo=True, logprobs=1, max_tokens=2, stream=True))
    parts = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    assert [lp for p in parts for lp in p.token_logprobs] == pytest.approx(
        told.token_logprobs, abs=2e-4
    )
    assert [offset for p in parts for offset in p.text_offset] == told.text_offset


def test_a_token_that_is_no_character_is_spelt_out(client):
    (choice,) = complete(client, [2039, 0xE2], echo=True, logprobs=0, max_tokens=0).choices
    assert choice.logprobs.tokens[1] == f"bytes:\\x{tokenizer.token_bytes(0xE2)[0]:02x}"


# --- the rest -------------------------------------------------------------------------------------


def test_what_is_served(client, server):
    listed = {model.id: model.poe for model in client.models.list()}
    assert list(listed) == [
        "poe-tiny",
        *(f"poe-tiny-{n}" for n in ("chat", "math", "tool")),
        "both",
    ]
    assert [about["kind"] for about in listed.values()] == [
        "base",
        *["specialist"] * 3,
        "composition",
    ]
    assert [about["chat"] for about in listed.values()] == [False, True, True, True, True]
    assert "wand" in listed["poe-tiny"]["modes"] and "wand" not in listed["both"]["modes"]
    assert client.models.retrieve("both").poe == listed["both"]
    import openai

    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("../../etc/passwd")


def test_tokens_there_and_back(server):
    for field in ("content", "prompt"):
        status, answer, _ = server.ask("/tokenize", {field: STORY})
        assert status == 200 and answer["tokens"] == tokenizer.encode(STORY)
    bare = server.ask("/tokenize", {"prompt": STORY, "add_special_tokens": False})[1]["tokens"]
    assert bare == tokenizer.encode(STORY, add_special_tokens=False)
    answer = server.ask("/detokenize", {"tokens": bare})[1]
    assert answer == {"content": STORY, "prompt": STORY}
    info = server.ask("/tokenizer_info")[1]
    ids = [
        server.ask("/tokenize", {"prompt": info[name], "add_special_tokens": False})[1]["tokens"]
        for name in ("bos_token", "eos_token")
    ]
    assert ids == [[tokenizer.bos_token_id], [tokenizer.token_id("<|assistant_end|>")]]


def test_another_specialists_turn_uses_what_the_first_has_read(client):
    talk = [{"role": "user", "content": "Please listen. " + "The sun is warm. " * 30}]
    first = chat(client, "chat", talk, max_tokens=2).usage
    assert first.prompt_tokens_details.cached_tokens == 0
    second = chat(client, "math", talk, max_tokens=2).usage
    assert second.prompt_tokens_details.cached_tokens == second.prompt_tokens - 1


def test_health_and_metrics(client, server):
    before = server.figures()
    lookup = {"mode": "speculative", "draft_lookup": True, "no_fallback": True}
    fact = "The capital of Japan is Tokyo. "
    talk = [{"role": "user", "content": 2 * fact + "What is the capital of Japan?"}]
    usage = chat(client, messages=talk, extra_body=lookup).usage
    after = server.figures()

    def grown(name: str) -> float:
        return after[f"cognica_mlx_{name}"] - before.get(f"cognica_mlx_{name}", 0)

    assert grown('requests_total{endpoint="chat",outcome="ok"}') == 1
    assert grown("completion_tokens_total") == usage.completion_tokens
    assert grown("prompt_tokens_total") == usage.prompt_tokens
    assert {"rounded", "lookup"} == set(usage.poe["drafts"])
    for drafter, verdicts in usage.poe["drafts"].items():
        for verdict, count in verdicts.items():
            labels = f'{{drafter="{drafter}",verdict="{verdict}"}}'
            assert grown(f"draft_tokens_total{labels}") == count
    by_stage = [grown(f'stage_tokens_total{{stage="{k}"}}') for k in range(5)]
    assert by_stage == usage.poe["tokens_per_stage"]
    assert grown("time_to_first_token_seconds_count") == 1
    cached = usage.prompt_tokens_details.cached_tokens
    assert grown("cached_prompt_tokens_total") == cached
    assert after["cognica_mlx_running_sequences"] == after["cognica_mlx_waiting_sequences"] == 0
    status, health, _ = server.ask("/health")
    assert (status, health["status"]) == (200, "ok")
