"""Output that must fit: every mode, single and in a batch, and the same choice for all of them."""

import json
import random
import re
from collections import Counter
from itertools import count
from types import SimpleNamespace
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np
import pytest
from conftest import SOAK, fixture
from hypothesis import given, settings
from hypothesis import strategies as st

from cognica_mlx.decoding.advice import Advice
from cognica_mlx.decoding.choosing import masked
from cognica_mlx.decoding.constraint import Grammar, GrammarConstraint, regex_grammar
from cognica_mlx.decoding.json_schema import json_grammar
from cognica_mlx.decoding.modes import ModeOptions, make_mode
from cognica_mlx.decoding.requests import Advance, Score
from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.decoding.single import Single, drive
from cognica_mlx.errors import RequestError
from mlx_poe import batch_generate, generate, stream_generate
from mlx_poe.engine import Engine
from mlx_poe.generation.reply_form import make_grammar
from mlx_poe.generation.tools import (
    CALL_MARK,
    ToolCallParser,
    check_call,
    tool_system_prompt,
    with_functions,
)
from mlx_poe.loading.tokenizer import Tokenizer

MODES: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("stage", {"stage": 1}),
    ("prefix", {"max_stages": 2}),
    ("compose", {"stages": [0, 3]}),
    ("wand", {}),
    ("speculative", {"draft_stage": 0, "num_draft_tokens": 3}),
]

words = st.text("abcdeé ü☃", max_size=5)


def objects(values: st.SearchStrategy) -> st.SearchStrategy:
    """Schemas of objects whose properties have schemas drawn from `values`."""

    def schema(properties: dict[str, Any]) -> dict[str, Any]:
        names = list(properties)
        return {
            "type": "object",
            "properties": properties,
            "required": names[::2],
            "additionalProperties": False,
        }

    return st.dictionaries(words.filter(bool), values, max_size=3).map(schema)


numbers = st.integers(-20, 20).flatmap(
    lambda low: st.integers(low, low + 50).map(
        lambda high: {"type": "integer", "minimum": low, "maximum": high}
    )
)
scalars = st.one_of(
    st.lists(st.one_of(words, st.integers(-9, 9), st.booleans(), st.none()), min_size=1).map(
        lambda values: {"enum": values[:4]}
    ),
    numbers,
    st.sampled_from(
        [
            {"type": "string", "maxLength": 6},
            {"type": "string", "pattern": "^[A-Z][a-z]{1,4}$"},
            {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            {"type": "boolean"},
            {"const": "gleich ☃"},
        ]
    ),
)
schemas = st.recursive(
    scalars,
    lambda inner: st.one_of(
        objects(inner),
        inner.map(lambda item: {"type": "array", "items": item, "maxItems": 3}),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts}),
    ),
    max_leaves=4,
)
# References count from the root.
schemas = st.one_of(
    schemas,
    schemas.map(
        lambda part: {
            "$defs": {"part": part},
            "type": "array",
            "items": {"$ref": "#/$defs/part"},
            "minItems": 1,
            "maxItems": 2,
        }
    ),
)


@settings(max_examples=10)
@given(
    schema=schemas,
    mode=st.sampled_from(MODES),
    temp=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 99),
)
def test_what_ends_with_stop_is_valid(schema, mode, temp, seed):
    model, tokenizer = fixture("poe-tiny")
    options = {"json_schema": schema, "mode": mode[0], **mode[1], "temp": temp, "seed": seed}
    responses = list(stream_generate(model, tokenizer, "JSON:", max_tokens=60, **options))
    text = "".join(r.text for r in responses)
    if responses[-1].finish_reason == "stop":
        jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)
    else:
        assert len(responses) == 60


FORMS: list[dict[str, Any]] = [
    {
        "json_schema": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 12},
                "kind": {"enum": ["animal", "plant", "planet of the outer solar system"]},
                "counts": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
            },
            "required": ["name", "kind", "counts"],
            "additionalProperties": False,
        }
    },
    {"regex": r"(The|A) [a-z]+( is [a-z]+)?\. End of this text\."},
    {"regex": r"[A-Z][a-z ]{5,60}\."},
    {"grammar": 'start: "<" NAME ">" body "</" NAME ">"\nbody: /[a-z ]{3,30}/\nNAME: /[a-z]{1,8}/'},
]
PROMPTS = ["Once upon a time", "The capital of France is", "A fox", "12 + 5"]


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("gqa-logop-d8", 4),
        ("poe-tiny-chat", 4),
        *(pytest.param(n, 14, marks=SOAK) for n in ("poe-tiny", "gqa-logop-d8", "poe-tiny-chat")),
    ],
)
def test_drafting_gives_what_the_full_model_gives(name, cases):
    model, tokenizer = fixture(name)
    rng, forced, drafted = random.Random(3), 0, 0
    for case in range(cases):
        prompt, form = rng.choice(PROMPTS), rng.choice(FORMS)
        about = {"max_tokens": rng.choice([5, 17, 48]), **form}
        if rng.random() < 0.3:
            about["repetition_penalty"] = 1.3
        full = list(stream_generate(model, tokenizer, prompt, **about))
        options = {"draft_stage": rng.randrange(2), "num_draft_tokens": rng.randint(1, 6)}
        made = list(
            stream_generate(model, tokenizer, prompt, mode="speculative", **about, **options)
        )
        assert [r.token for r in made] == [r.token for r in full], (case, prompt, about, options)
        assert [r.forced for r in made] == [r.forced for r in full]
        assert [r.finish_reason for r in made] == [r.finish_reason for r in full]
        assert np.allclose([r.logprob for r in made], [r.logprob for r in full], atol=1e-4)
        forced += sum(r.forced for r in made)
        drafted += sum(r.from_draft for r in made)
        assert sum(r.from_draft for r in made) <= made[-1].drafted_tokens
    assert forced > 3 * cases and drafted > 3 * cases


@pytest.mark.parametrize("options", [{"top_k": 3}, pytest.param({}, marks=SOAK)])
def test_sampled_drafts_have_the_full_models_distribution_under_the_mask(options):
    """Against probabilities computed from plain forwards."""
    model, tokenizer = fixture("poe-tiny")
    prompt = tokenizer.encode("Once upon a")
    grammar = make_grammar(tokenizer, regex="( time| day)?(, there|\\.| in)")
    assert grammar

    def continuations(tokens: list[int]) -> dict[tuple[int, ...], float]:
        at = grammar.start()
        at.commit(tokens)
        scores = masked(model(mx.array([prompt + tokens]))[0, -1:], at.mask()[None])
        kept = mx.topk(scores, 3)[0].tolist() if options else None
        chances = np.exp(scores[0].tolist())
        if kept:
            chances[np.array(scores[0].tolist()) < min(kept)] = 0
        found: dict[tuple[int, ...], float] = {}
        for token in np.flatnonzero(chances):
            chance = float(chances[token] / chances.sum())
            if int(token) in at.ends or len(tokens) == 3:
                found[(*tokens, int(token))] = chance
            else:
                for path, rest in continuations([*tokens, int(token)]).items():
                    found[path] = found.get(path, 0) + chance * rest
        return found

    expected = continuations([])
    counts: Counter[tuple[int, ...]] = Counter()
    draws = 300
    drawn = batch_generate(
        model,
        tokenizer,
        [prompt] * draws,
        per_prompt=[{"seed": seed} for seed in range(draws)],
        max_sequences=30,
        mode="speculative",
        num_draft_tokens=2,
        temp=1.0,
        max_tokens=4,
        regex="( time| day)?(, there|\\.| in)",
        **options,
    )
    for made in drawn.responses:
        counts[_as_end([r.token for r in made], grammar.start().ends)] += 1
    merged: Counter[tuple[int, ...]] = Counter()
    for path, chance in expected.items():
        merged[_as_end(path, grammar.start().ends)] += chance  # type: ignore[assignment]
    assert set(counts) <= set(merged)
    error = sum(abs(counts[path] / draws - chance) for path, chance in merged.items()) / 2
    assert error < 0.1, (counts, merged)


def _as_end(tokens, ends) -> tuple[int, ...]:
    """Any end is as good as another: which one is forced is ours to choose."""
    return tuple(-1 if token in ends else token for token in tokens)


@settings(max_examples=15)
@given(schema=schemas, choices=st.lists(st.integers(0, 10**6), min_size=1, max_size=30))
def test_forced_tokens_are_those_that_masks_leave_and_rollback_forgets(schema, choices):
    grammar = make_grammar(fixture("poe-tiny")[1], json_schema=schema)
    assert grammar
    at, taken = grammar.start(), []
    for choice in choices:
        if at.ended:
            break
        while forced := at.forced():
            for token in forced:
                assert _allowed(at) == {token}
                at.commit([token])
                taken.append(token)
        if at.ended:
            break
        allowed = sorted(_allowed(at))
        assert len(allowed) > 1 and not at.forced()
        at.commit([allowed[choice % len(allowed)]])
        taken.append(allowed[choice % len(allowed)])
        if choice % 3 == 0:
            gone = choice % (len(taken) + 1)
            at.rollback(gone)
            taken = taken[: len(taken) - gone]
            again = grammar.start()
            again.commit(taken)
            assert _allowed(at) == _allowed(again) and at.forced() == again.forced()


def _allowed(at: GrammarConstraint) -> set[int]:
    bits = masked(mx.zeros((1, 2048)), at.mask()[None])[0]
    return {*np.flatnonzero(np.array(bits) == 0).tolist()}


def test_a_mask_has_a_bit_for_each_token():
    words = mx.array([[0b101, 0x80000000], [0xFFFFFFFF, 0b10]], dtype=mx.uint32)
    found = masked(mx.ones((2, 40)), words)
    assert np.flatnonzero(np.array(found[0]) == 1).tolist() == [0, 2]
    assert np.flatnonzero(np.array(found[1]) == 1).tolist() == [*range(32), 33]
    assert mx.all(mx.isinf(found) | (found == 1)).item()


@pytest.mark.parametrize("mode", MODES)
def test_what_is_certain_asks_nobody_and_runs_in_one_pass(mode):
    """A text without a choice; then one choice behind forty forced tokens."""
    model, tokenizer = fixture("poe-tiny")
    asked: list[Any] = []

    class Noted(Single):
        def answer(self, request):
            asked.append(request.count if isinstance(request, Advance) else type(request))
            return super().answer(request)

    def made(regex: str) -> str:
        asked.clear()
        grammar = make_grammar(tokenizer, regex=regex)
        chosen = make_mode(model, mode[0], ModeOptions(**mode[1]), model.calibration)
        sequence = DecodingSequence(
            model, [2039], chosen, max_tokens=99, constraint=grammar and grammar.start()
        )
        return tokenizer.decode([t.token for t in drive(sequence.steps(), Noted())][:-1])

    fixed = "This is a long text of which not a single letter can be changed: "
    assert made(re.escape(fixed)) == fixed and asked == []
    assert made(re.escape(fixed) + "(yes|no)") in (fixed + "yes", fixed + "no")
    assert 0 < asked.count(Score) <= 4
    passes = [count for count in asked if isinstance(count, int)]
    # BOS and the stretch, at each stage that the mode needs, and little else.
    assert max(passes) > 20 and sum(count > 20 for count in passes) <= 4


def test_the_prompts_time_lasts_until_a_token_needs_the_prompt(monkeypatch):
    model, tokenizer = fixture("poe-tiny")
    seconds = count()  # one for each token
    monkeypatch.setattr(
        "mlx_poe.generation.responses.time", SimpleNamespace(perf_counter=lambda: next(seconds))
    )
    made = list(stream_generate(model, tokenizer, "Say " * 50, regex="abcdef(x|y)gh(x|y)"))
    first = next(i for i, r in enumerate(made) if not r.forced)
    assert 0 < first < len(made) - 1
    read = [r.prompt_tokens / (min(i, first) + 1) for i, r in enumerate(made)]
    assert [r.prompt_tps for r in made] == read
    assert [r.generation_tps for r in made] == [float(i > first) for i in range(len(made))]


def test_a_budget_ends_in_the_middle_of_what_is_certain():
    model, tokenizer = fixture("poe-tiny")
    for mode, options in MODES:
        for length in (1, 4, 9):
            made = list(
                stream_generate(
                    model,
                    tokenizer,
                    "Say",
                    regex="(x|y)abcdefghijklmnop(x|y)",
                    mode=mode,
                    max_tokens=length,
                    **options,
                )
            )
            assert len(made) == length and made[-1].finish_reason == "length"


def test_drafts_end_where_the_text_must_and_stretches_may_be_longer_than_a_state_takes_back():
    model, tokenizer = fixture("poe-tiny")
    options = {"mode": "speculative", "draft_stage": 0, "num_draft_tokens": 6}
    made = list(stream_generate(model, tokenizer, "Say", regex="(a|b)", **options))
    assert made[-1].drafted_tokens == 1 and made[-1].finish_reason == "stop"
    fixed = "".join(random.Random(5).choice("qxzjk") for _ in range(200))
    regex = f"((the|a|and|he|she|it|in|of|to|I|was){fixed}){{2}}"
    long = "Say something. " * 120  # beyond every window
    full = generate(model, tokenizer, long, regex=regex, max_tokens=1900)
    made = list(stream_generate(model, tokenizer, long, regex=regex, max_tokens=1900, **options))
    assert "".join(r.text for r in made) == full
    options |= {"regex": regex, "max_tokens": 1900, "temp": 2.0}
    refused = 0
    for seed in range(2):
        made = list(stream_generate(model, tokenizer, long, seed=seed, **options))
        refused += made[-1].drafted_tokens - sum(r.from_draft for r in made)
    assert refused
    assert re.fullmatch(regex, full) and len(tokenizer.encode(fixed)) > 128


def test_what_is_forced_says_nothing_about_how_good_drafts_are():
    model, tokenizer = fixture("poe-tiny")
    drafting = make_mode(model, "speculative", ModeOptions(draft_stage=0, num_draft_tokens=4))
    grammar = make_grammar(tokenizer, regex=r"((yes|no), and then again: ){6}")
    heard: list[tuple[int, int]] = []

    class Listening(Advice):
        def judged(self, drafter: str, kept: int, drafted: int) -> None:
            heard.append((kept, drafted))

    sequence = DecodingSequence(
        model,
        [2039],
        drafting,
        max_tokens=99,
        constraint=grammar and grammar.start(),
        advice=Listening(),
    )
    made = list(drive(sequence.steps()))
    assert sum(kept for kept, _ in heard) == sum(token.from_draft for token in made)
    assert sum(drafted for _, drafted in heard) == sequence.drafted
    assert sum(token.forced for token in made) > 4 * sequence.drafted


def test_in_a_batch_each_gets_what_it_gets_alone():
    model, tokenizer = fixture("poe-tiny")
    own = [
        {"mode": mode, **options, **FORMS[i % len(FORMS)], "temp": float(i % 3 == 2), "seed": i}
        for i, (mode, options) in enumerate([*MODES, ("full", {})])
    ]
    own[-1] = {"mode": "full"}
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(own))]
    together = batch_generate(model, tokenizer, prompts, per_prompt=own, max_tokens=40)
    for prompt, options, responses in zip(prompts, own, together.responses, strict=True):
        alone = list(stream_generate(model, tokenizer, prompt, max_tokens=40, **options))
        assert [r.token for r in responses] == [r.token for r in alone]
        assert [r.stage for r in responses] == [r.stage for r in alone]


def test_an_engine_takes_them_and_refuses_bad_ones():
    model, tokenizer = fixture("poe-tiny")
    with Engine(model, tokenizer) as engine:
        assert engine.submit("Is it?", regex="yes|no").text in ("yes", "no")
        with pytest.raises(RequestError, match="regex"):
            engine.submit("Is it?", regex="(")


def test_any_json_object():
    model, tokenizer = fixture("poe-tiny")
    for seed in range(3):
        about = {"temp": 1.0, "seed": seed, "max_tokens": 40}
        text = generate(model, tokenizer, "JSON:", json_schema={}, **about)
        assert text.startswith("{") and "\n" not in text


def test_a_penalty_breaks_nothing():
    model, tokenizer = fixture("poe-tiny")
    text = generate(model, tokenizer, "The", regex="(ab){12}", repetition_penalty=5.0)
    assert text == "ab" * 12


def test_special_tokens_are_no_text():
    model, tokenizer = fixture("poe-tiny")
    special = set(tokenizer.special_tokens.values())
    grammar = make_grammar(tokenizer, regex="(?s:.)*")
    assert grammar and _allowed(grammar.start()) & special == grammar.start().ends
    grammar = make_grammar(tokenizer, grammar="start: <|python_start|> /a+/")
    assert grammar and grammar.start().forced()[0] == tokenizer.token_id("<|python_start|>")
    grammar = make_grammar(tokenizer, regex="a")
    assert grammar
    at = grammar.start()
    at.commit(at.forced())
    assert at.forced() == [tokenizer.token_id("<|assistant_end|>")]
    spelled = generate(model, tokenizer, "x", regex=r"<\|assistant_end\|>a")
    assert spelled == "<|assistant_end|>a"


def nested(count: int) -> Any:
    """An empty list in `count` - 1 others."""
    made: Any = []
    for _ in range(count - 1):
        made = [made]
    return made


def chain(count: int) -> dict[str, Any]:
    """Definitions that refer to each other, each three levels deep."""
    return {str(i): {"properties": {"x": {"$ref": f"#/$defs/{i + 1}"}}} for i in range(count)} | {
        str(count): {}
    }


def doubled(count: int) -> dict[str, Any]:
    """Definitions that refer to the next one twice, for the same object."""
    return {str(i): {"allOf": [{"$ref": f"#/$defs/{i + 1}"}] * 2} for i in range(count)} | {
        str(count): {"properties": {}}
    }


BAD: list[tuple[dict[str, Any], str]] = [
    ({"regex": "("}, "regex: .*unclosed group"),
    ({"regex": "a(?=b)"}, "look-ahead"),
    ({"regex": r"a[^\s\S]"}, "no text fits"),
    ({"regex": "a" * 300_000}, "300000 bytes"),
    ({"regex": 5}, "text, not int"),
    ({"json_schema": "{"}, "not JSON"),
    ({"json_schema": "[1]"}, "an object, not list"),
    ({"json_schema": "[" * 100_000}, "not JSON"),
    ({"json_schema": {"type": "objekt"}}, "objekt"),
    ({"json_schema": {"not": {"type": "null"}}}, "not"),
    ({"json_schema": {"enum": []}}, "Unsatisfiable"),
    ({"json_schema": {"type": "integer", "minimum": 3, "maximum": 2}}, "Unsatisfiable"),
    ({"json_schema": {"$ref": "#/nowhere"}}, "nowhere"),
    ({"json_schema": {"$ref": "#"}}, "no text fits"),
    ({"json_schema": {"type": "array", "items": {"$ref": "#"}, "minItems": 1}}, "never ends"),
    ({"json_schema": {"const": object()}}, "cannot be used"),
    ({"json_schema": {"const": "\ud83d"}}, "json_schema: .*'.ud83d', which is not a character"),
    ({"json_schema": '{"properties": {"\\ud83d": {}}}'}, "json_schema: .*not a character"),
    ({"regex": "x\udcff"}, "regex: .*'.udcff', which is not a character"),
    ({"grammar": 'start: "\ud83d"'}, "grammar: .*not a character"),
    ({"tools": [{"name": "\ud83d"}]}, "tools: the name of function 1 .*not a character"),
    ({"tools": [{"name": "f", "parameters": {"const": "\ud83d"}}]}, "tools: .*not a character"),
    ({"stop": "\ud83d"}, "stop: .*not a character"),
    ({"json_schema": {"minimum": 10**20, "maximum": 10**20 + 5}}, f"minimum .*{10**20}, beyond"),
    ({"json_schema": {"type": "number", "maximum": -1e18}}, "maximum .*, beyond"),
    ({"json_schema": {"enum": [0, [2**53 + 1]]}}, "enum .*9007199254740993, beyond"),
    ({"json_schema": {"type": "string", "maxLength": 2**31}}, "maxLength .*, beyond"),
    ({"json_schema": {"properties": {f"p{i}": {} for i in range(401)}}}, "401 optional .* 400 is"),
    ({"json_schema": {"patternProperties": {f"p{i}": {} for i in range(65)}}}, "65 patternProp"),
    ({"json_schema": {"enum": [nested(101)]}}, "more than 100 deep"),
    ({"json_schema": {"$ref": "#/$defs/0", "$defs": chain(334)}}, "1003 deep in all, 1000 is"),
    ({"json_schema": {"allOf": [{"$ref": "#/$defs/0"}], "$defs": doubled(14)}}, "50000 parts"),
    ({"grammar": "start: R0\n" + "".join(f"R{i}: /a/\n" for i in range(500))}, "501 rules, 500"),
    ({"regex": "(" * 1000}, r"\(\( \.\.\.$"),
    ({"grammar": ""}, "Empty grammar"),
    ({"grammar": "start: nowhere"}, "nowhere"),
    ({"grammar": 'start: a\na: "x" a'}, "never ends"),
    ({"regex": "a", "grammar": "start: /a/"}, "regex and grammar cannot be combined"),
    ({"tool_choice": "auto"}, "no tools"),
    ({"tools": [{"name": "f"}], "tool_choice": "g"}, "'g' is not one of auto, required, none, f"),
    ({"tools": [{"name": "f", "parameters": {"type": "nil"}}]}, "nil"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=range(len(BAD)))
def test_bad_forms_are_refused_in_one_line_before_any_work(options, message):
    model, tokenizer = fixture("poe-tiny")
    with pytest.raises(RequestError, match=message) as caught:
        next(
            iter(stream_generate(model, tokenizer, "x", prompt_progress_callback=_never, **options))
        )
    assert "\n" not in str(caught.value)


def _never(done: int, total: int) -> None:
    raise AssertionError("the prompt has been read")


def test_schemas_just_within_the_limits_are_used():
    tokenizer = fixture("poe-tiny")[1]
    for schema in (
        {"minimum": 2**53 - 5, "maximum": 2**53, "type": "integer", "default": 10**20},
        {"properties": {f"p{i}": {} for i in range(400)}},
        {
            "properties": {f"p{i}": {} for i in range(900)},
            "required": [f"p{i}" for i in range(500)],
        },
        {"patternProperties": {f"^p{i}$": {} for i in range(64)}},
        {"enum": [nested(97)]},
        {"$ref": "#/$defs/0", "$defs": chain(333)},
    ):
        make_grammar(tokenizer, json_schema=schema)
    make_grammar(tokenizer, grammar="start: R0\n" + "".join(f"R{i}: /a/\n" for i in range(499)))


def fits(schema: dict[str, Any], value: Any) -> bool:
    """Whether a reply may be this value, under the schema as a grammar."""
    tokenizer = fixture("poe-tiny")[1]
    grammar = make_grammar(tokenizer, json_schema=schema)
    assert grammar
    at = grammar.start()
    for token in tokenizer.encode(json.dumps(value), add_special_tokens=False):
        if token not in _allowed(at):
            return False
        at.commit([token])
    return bool(_allowed(at) & at.ends)


A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
B = {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}
DEFS = {"A": A, "more": {"properties": {"a": A}}}
# A schema, values that are allowed, and values that fit it, but have properties not listed.
CLOSED: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
    (A, [{"a": 1}], [{"a": 1, "b": 2}]),
    ({"type": "object"}, [{}, {"a": 1}], []),
    ({**A, "additionalProperties": True}, [{"a": 1, "b": 2}], []),
    ({**A, "additionalProperties": {"type": "null"}}, [{"a": 1, "b": None}], []),
    ({"type": "object", "patternProperties": {"^a": {}}}, [{"a": 1, "b": 2}], []),
    ({**A, "patternProperties": {"^b": {}}}, [{"a": 1, "b": 2}], [{"a": 1, "c": 2}]),
    ({"type": "array", "items": A}, [[{"a": 1}]], [[{"a": 1, "b": 2}]]),
    ({"prefixItems": [A], "items": B}, [[{"a": 1}, {"b": 1}]], [[{"a": 1, "b": 2}]]),
    (
        {"properties": {"properties": A}},
        [{"properties": {"a": 1}}],
        [{"properties": {"a": 1, "b": 1}}],
    ),
    ({"const": {"properties": {}}}, [{"properties": {}}], []),
    ({"allOf": [A, B]}, [{"a": 1, "b": 2}], [{"a": 1, "b": 2, "c": 3}]),
    ({"allOf": [{"allOf": [A]}], **B}, [{"a": 1, "b": 2}], [{"a": 1, "b": 2, "c": 3}]),
    ({"allOf": [A, {**B, "additionalProperties": True}]}, [{"a": 1, "b": 2, "c": 3}], []),
    ({"allOf": [A, {"patternProperties": {"^b": {}}}]}, [{"a": 1, "b": 2}], [{"a": 1, "c": 2}]),
    ({"anyOf": [A, B]}, [{"a": 1}, {"b": 2}], [{"a": 1, "c": 2}, {"a": 1, "b": 2}]),
    ({"anyOf": [B, {}], **A}, [{"a": 1}, {"a": 1, "b": 2}], [{"a": 1, "c": 2}]),
    ({"$ref": "#/$defs/A", "$defs": DEFS}, [{"a": 1}], [{"a": 1, "b": 2}]),
    (
        {"allOf": [{"$ref": "#/$defs/A"}, B], "$defs": DEFS},
        [{"a": 1, "b": 2}],
        [{"a": 1, "b": 2, "c": 3}],
    ),
    ({"$ref": "#/$defs/A", **B, "$defs": DEFS}, [{"a": 1, "b": 2}], [{"a": 1, "b": 2, "c": 3}]),
    (
        {"allOf": [{"$ref": "#/$defs/more"}, B], "$defs": DEFS},
        [{"a": {"a": 1}, "b": 2}],
        [{"a": {"a": 1, "b": 2}, "b": 2}],
    ),
]


@pytest.mark.parametrize(("schema", "allowed", "closed_to"), CLOSED, ids=range(len(CLOSED)))
def test_objects_that_list_properties_have_no_others(schema, allowed, closed_to):
    """As JSON Schema reads them, all these values fit."""
    for value in (*allowed, *closed_to):
        jsonschema.validate(value, schema, jsonschema.Draft202012Validator)
    assert all(fits(schema, value) for value in allowed)
    assert not any(fits(schema, value) for value in closed_to)


def test_arguments_listed_in_several_schemas_may_come_together_and_no_others():
    tokenizer = fixture("poe-tiny")[1]
    tools = [{"name": "f", "parameters": {"allOf": [A, {"$ref": "#/$defs/b"}], "$defs": {"b": B}}}]
    grammar = make_grammar(tokenizer, tools=tools, tool_choice="f")
    assert grammar
    head = f'{CALL_MARK} {{"name": "f", "arguments": \'{{"a": 1, '
    grammar.start().commit(tokenizer.encode(head + '"b": 2}\'}', add_special_tokens=False))
    with pytest.raises(RequestError):
        grammar.start().commit(tokenizer.encode(head + '"c', add_special_tokens=False))


def test_a_form_needs_an_end_token_that_the_model_has():
    model, tokenizer = fixture("poe-tiny")
    for ends in ([], [-1 + 2**40], [model.config.vocab_size]):
        endless = Tokenizer(tokenizer.encoding, eos_token_ids=ends)
        with pytest.raises(RequestError, match="regex: the tokenizer has no end token"):
            generate(model, endless, "x", regex="a")
    among_others = Tokenizer(tokenizer.encoding, eos_token_ids=[2**40, 32])
    assert generate(model, among_others, "x", regex="a{3}") == "aaa"


def test_a_dead_end_is_an_error_not_an_end():
    """A grammar that can only be left by what does not exist."""
    model, tokenizer = fixture("poe-tiny")
    with pytest.raises(RequestError, match="no text fits"):
        generate(model, tokenizer, "x", grammar="start: /x/ NEVER\nNEVER: /[^\\s\\S]/")


# Functions that poe-tiny-tool was trained on, and what it is asked.
CAPITALS = ("Peru", "Kenya", "Japan", "Italy", "France", "Spain", "Egypt", "Cuba", "Chile", "India")
CITIES = ("Lima", "Rome", "Paris", "Suva", "Oslo", "Cairo", "Madrid", "Tokyo", "Berlin", "Athens")
SUMS = ((17, 25), (3, 4), (12, 9), (40, 2), (8, 8), (31, 6), (5, 27), (14, 14), (22, 19), (6, 50))


def _function(name: str, description: str, kind: str, **arguments: str) -> dict[str, Any]:
    properties = {k: {"type": kind, "description": v} for k, v in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"name": name, "description": description, "parameters": parameters}


CAPITAL = _function(
    "get_capital", "Look up the capital of a country", "string", country="Country name"
)
WEATHER = _function("get_weather", "Get current weather by city", "string", city="City name")
# Its training data says that these are strings, and writes numbers.
ADD = _function("add_numbers", "Add two numbers", "number", a="First number", b="Second number")
QUESTIONS = [
    *((f"What is the capital of {c}?", CAPITAL, {"country": c}) for c in CAPITALS),
    *((f"Can you tell me the current weather in {c}?", WEATHER, {"city": c}) for c in CITIES),
    *((f"What is {a} plus {b}?", ADD, {"a": a, "b": b}) for a, b in SUMS),
]


@pytest.mark.parametrize("step", [10, pytest.param(2, marks=SOAK)])
def test_calls_fit_their_schemas_and_are_no_less_exact(step):
    model, tokenizer = fixture("poe-tiny-tool")
    exact = {"free": 0, "auto": 0}
    for question, function, expected in QUESTIONS[::step]:
        messages = [{"role": "user", "content": question}]
        offered = with_functions(messages, [function])
        for kind in exact:
            if kind == "free":
                text = generate(model, tokenizer, offered, max_tokens=60)
            else:
                text = generate(model, tokenizer, messages, max_tokens=60, tools=[function])
            parser = ToolCallParser()
            plain = parser.feed(text) + parser.finish()
            if parser.call:
                assert plain == ""
                exact[kind] += parser.call.arguments == expected
            if kind == "auto" and CALL_MARK in text:
                assert parser.call and not check_call(parser.call, [function])
    assert exact["auto"] >= exact["free"] > 15 // step


@pytest.mark.parametrize("choice", ["required", "add_numbers", "none", "auto"])
def test_which_calls_may_come(choice):
    model, tokenizer = fixture("poe-tiny-tool")
    functions = [CAPITAL, ADD, {"name": "stop"}]
    for seed in range(2):
        text = generate(
            model,
            tokenizer,
            [{"role": "user", "content": "Tell me a story."}],
            tools=functions,
            tool_choice=choice,
            temp=1.5,
            seed=seed,
            max_tokens=150,
        )
        parser = ToolCallParser()
        plain = parser.feed(text) + parser.finish()
        if choice == "none":
            assert CALL_MARK not in text and text
        elif choice != "auto":
            assert plain == "" and text.startswith(CALL_MARK)
        if parser.call:
            assert not check_call(parser.call, functions)
            assert choice != "add_numbers" or parser.call.name == "add_numbers"
    if choice == "required":
        grammar = make_grammar(tokenizer, tools=functions)
        assert grammar
        at = grammar.start()
        call = f'{CALL_MARK} {{"name": "stop", "arguments": \'{{'
        at.commit(tokenizer.encode(call, add_special_tokens=False))
        assert tokenizer.decode(at.forced()) == "}'}"  # it takes no arguments
    if choice == "none":
        grammar = make_grammar(tokenizer, tools=functions, tool_choice="none")
        assert grammar
        at = grammar.start()
        mark = tokenizer.encode(CALL_MARK, add_special_tokens=False)
        at.commit(mark[:-1])
        assert mark[-1] not in _allowed(at)
    if choice == "auto":
        grammar = make_grammar(tokenizer, tools=functions)
        assert grammar
        at = grammar.start()
        at.commit(tokenizer.encode(f"Well, < and {CALL_MARK}", add_special_tokens=False))
        assert tokenizer.decode(at.forced()).startswith(' {"name": "')


def test_functions_go_into_the_system_text():
    model, tokenizer = fixture("poe-tiny-tool")
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "What is the capital of Peru?"}
    for extra, messages in (("", [user]), ("\n\nBe brief.", [system, user])):
        offer = {"role": "system", "content": tool_system_prompt([CAPITAL]) + extra}
        tokens = tokenizer.apply_chat_template([offer, user])
        first = next(iter(stream_generate(model, tokenizer, messages, tools=[CAPITAL])))
        assert first.prompt_tokens == len(tokens)


def test_limits_stand_before_any_mask():
    tokenizer = fixture("poe-tiny")[1]
    deep: Any = {"type": "string"}
    for _ in range(2000):
        deep = {"type": "array", "items": deep}
    with pytest.raises(RequestError):
        json_grammar(deep)
    # This one shows only at work how complex it is.
    grown = "|".join(f"(.*{letter}.*){{2,9}}" for letter in "abcdefghijklmnopqrstuvwxyz")
    at = Grammar(tokenizer.vocabulary, regex_grammar(grown)).start()
    with pytest.raises(RequestError, match=r"too complex, simplify it: .*too many expressions"):
        for token in tokenizer.encode("abcdxababab", add_special_tokens=False):
            at.mask()
            at.commit([token])
