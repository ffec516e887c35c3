"""Tool calls: the system text against the goldens, the streaming parser, the schema checks."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cognica_mlx.errors import RequestError
from mlx_poe.generation.tools import (
    CALL_MARK,
    MAX_CALL,
    ToolCall,
    ToolCallParser,
    check_call,
    read_functions,
    tool_system_prompt,
)
from mlx_poe.loading.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
GOLDENS = json.loads((ROOT / "tests" / "fixtures" / "poe-tiny-goldens.json").read_text())["tool"]
TOKENIZER = Tokenizer.from_folder(ROOT / "mlx_poe" / "models" / "poe-tiny")


def function(name: str, description: str, **arguments: str) -> dict[str, Any]:
    """A function whose arguments, given with their descriptions, are required strings."""
    properties = {a: {"type": "string", "description": d} for a, d in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"name": name, "description": description, "parameters": parameters}


WEATHER = function("get_weather", "Get current weather by city", city="City name")
CAPITAL = function("get_capital", "Look up the capital of a country", country="Country name")
ADD = function("add_numbers", "Add two numbers", a="First number", b="Second number")
FUNCTIONS = [WEATHER, CAPITAL, ADD]
QUESTIONS = (
    "Can you tell me the current weather in Seoul?",
    "What is the capital of Peru?",
    "What is 17 plus 25?",
)
# What stage-tool said to them (it knows no Seoul).
OUTPUTS = (
    """<functioncall> {"name": "get_weather", "arguments": '{"city": "Suva"}'}""",
    """<functioncall> {"name": "get_capital", "arguments": '{"country": "Peru"}'}""",
    """<functioncall> {"name": "add_numbers", "arguments": '{"a": 17, "b": 25}'}""",
)
CALLS = (
    ToolCall("get_weather", {"city": "Suva"}),
    ToolCall("get_capital", {"country": "Peru"}),
    ToolCall("add_numbers", {"a": 17, "b": 25}),
)
WEATHER_TEXT = """\
You are a helpful assistant with access to the following functions. Use them if required -
{
    "name": "get_weather",
    "description": "Get current weather by city",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {
                "type": "string",
                "description": "City name"
            }
        },
        "required": [
            "city"
        ]
    }
}"""


def parse(text: str, *cuts: int) -> tuple[str, ToolCall | None, str | None]:
    """(plain text, call, problem) of `text` fed in pieces; every character apart without cuts."""
    parser = ToolCallParser()
    edges = [0, *sorted(cuts), len(text)] if cuts else range(len(text) + 1)
    pieces = [text[a:b] for a, b in zip(edges, list(edges)[1:], strict=False)]
    plain = "".join(map(parser.feed, pieces)) + parser.finish()
    assert parser.done == (parser.call is not None or parser.problem is not None)
    assert parser.call is None or parser.problem is None
    return plain, parser.call, parser.problem


def call_with(arguments: str) -> str:
    return f'{CALL_MARK} {{"name": "f", "arguments": {arguments}}}'


# --- the system text ------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(3))
def test_prompts_of_the_goldens_token_for_token(index: int) -> None:
    described = FUNCTIONS[index]
    for functions in (described, [described], json.dumps(described), json.dumps([described])):
        messages = [
            {"role": "system", "content": tool_system_prompt(functions)},
            {"role": "user", "content": QUESTIONS[index]},
        ]
        assert TOKENIZER.apply_chat_template(messages) == GOLDENS[index]["prompt"]


def test_system_text_is_laid_out_with_four_spaces_and_a_blank_line_between_functions() -> None:
    assert tool_system_prompt(json.dumps(WEATHER, separators=(",", ":"))) == WEATHER_TEXT
    assert tool_system_prompt([WEATHER, CAPITAL]).startswith(WEATHER_TEXT + "\n\n{\n    ")
    assert "Städte" in tool_system_prompt({"name": "f", "description": "Städte"})


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ("", "not JSON"),
        ("{'name': 'f'}", "not JSON"),
        ('{"name": "f", "weight": NaN}', "not JSON"),
        ("[" * 100_000, "not JSON: nested"),
        ("[" * 100 + "]" * 100, "not JSON: nested"),
        ("[]", "empty"),
        ("3", "function 1 has type integer"),
        ('[{"name": "f"}, "g"]', "function 2 has type string"),
        ('{"description": "no name"}', 'function 1 has no "name"'),
        ('{"name": 1}', 'function 1 has no "name"'),
        ('{"name": "f", "parameters": ["city"]}', "function 1: its parameters"),
        ({"name": "f", "weight": {1, 2}}, "not JSON"),
        (b"[]", "not JSON"),
    ],
)
def test_bad_functions_are_one_line(functions: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        tool_system_prompt(functions)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_functions_that_contain_themselves_are_refused() -> None:
    loop: dict[str, Any] = {"name": "f"}
    loop["parameters"] = loop
    with pytest.raises(RequestError, match="not JSON"):
        read_functions(loop)


# --- the parser -----------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("after", ["", "]}]}]}", '<|assistant_end|>tin, "b": \'{"a": ', " {{{"])
def test_outputs_of_the_goldens_whatever_follows(index: int, after: str) -> None:
    assert TOKENIZER.decode(GOLDENS[index]["full"]) == OUTPUTS[index] + "<|assistant_end|>"
    assert parse(OUTPUTS[index] + after) == ("", CALLS[index], None)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("""'{"city": "L'Aquila"}'""", {"city": "L'Aquila"}),
        ("""'{"city": "L\\'Aquila"}'""", {"city": "L'Aquila"}),
        ("""'{"a": "'}'}", "b": "{{[\\"}"}'""", {"a": "'}'}", "b": '{{["}'}),
        ("""'{"a": "back\\\\", "b": "\\u00e9\\n"}'""", {"a": "back\\", "b": "é\n"}),
        ("""'{"a": {"b": [{"c": {}}, "]}"]}}'""", {"a": {"b": [{"c": {}}, "]}"]}}),
        ("""'{"text": "two\nlines"}'""", {"text": "two\nlines"}),
        ("""'\n{\n  "a": true,\n  "b": null\n}\n'""", {"a": True, "b": None}),
        ("""{"city": "L'Aquila"}""", {"city": "L'Aquila"}),
        ('''"{\\"city\\": \\"L'Aquila {\\"}"''', {"city": "L'Aquila {"}),
        ("'{}'", {}),
    ],
)
def test_arguments_in_every_dress(arguments: str, expected: dict[str, Any]) -> None:
    text = call_with(arguments) + "]}'}]}"
    assert parse(text) == ("", ToolCall("f", expected), None)
    assert parse(text, 3) == ("", ToolCall("f", expected), None)


def test_arguments_may_come_first_or_not_at_all() -> None:
    first = f"""{CALL_MARK}{{"arguments": '{{"a": "it's"}}', "name": "f"}}"""
    assert parse(first) == ("", ToolCall("f", {"a": "it's"}), None)
    assert parse(f'{CALL_MARK}{{"name": "f"}}') == ("", ToolCall("f", {}), None)


def test_call_is_known_with_its_last_brace() -> None:
    parser = ToolCallParser()
    assert parser.feed(OUTPUTS[0][:-1]) == ""
    assert not parser.done
    assert parser.feed("}") == ""
    assert parser.call == CALLS[0]
    assert parser.feed("]}]} more") + parser.finish() == ""
    assert parser.call == CALLS[0]
    assert parser.problem is None


def test_text_before_the_call_comes_through_and_a_possible_mark_is_held_back() -> None:
    parser = ToolCallParser()
    assert parser.feed("Let me see: a<b, <func") == "Let me see: a<b, "
    assert parser.feed("y> ") == "<funcy> "
    assert parser.feed("<<functioncal") == "<"
    assert parser.feed(OUTPUTS[2][len("<functioncal") :]) == ""
    assert parser.call == CALLS[2]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I'm sorry, I don't have a function for that.",
        "Almost <functioncall",
        """The capital of get_weather", "arguments": '{"a": 12}'}""",
    ],
)
def test_text_without_a_call_is_plain(text: str) -> None:
    assert parse(text) == (text, None, None)


@given(
    st.text(st.sampled_from("<functioncall> x'{")),
    st.dictionaries(st.text(), st.text(st.sampled_from("\"'\\{}[]:, é\n")) | st.lists(st.none())),
    st.sampled_from(["single", "object", "double"]),
    st.text(),
    st.data(),
)
def test_any_call_reads_the_same_wherever_it_is_cut(
    before: str, arguments: dict[str, Any], dress: str, after: str, data: st.DataObject
) -> None:
    before = before.replace(CALL_MARK, "")
    written = json.dumps(arguments)
    dressed = {"single": f"'{written}'", "object": written, "double": json.dumps(written)}
    text = before + call_with(dressed[dress]) + after
    if CALL_MARK in before:  # taking one mark out can make another
        return
    expected = (before, ToolCall("f", arguments), None)
    cuts = data.draw(st.lists(st.integers(0, len(text)), min_size=1, max_size=6))
    assert parse(text) == parse(text, *cuts) == expected


def test_every_single_cut_gives_the_same() -> None:
    text = "Well: " + call_with("""'{"city": "L'A\\"qui}la"}'""") + "]}]}]}"
    whole = parse(text, 0)
    assert whole == ("Well: ", ToolCall("f", {"city": "L'A\"qui}la"}), None)
    assert all(parse(text, cut) == whole for cut in range(len(text) + 1))


@given(st.text(st.sampled_from("\"'\\{}[]:, a1") | st.characters()))
def test_any_junk_ends_in_a_call_or_a_problem(junk: str) -> None:
    plain, call, problem = parse(f"hm {CALL_MARK}{junk}")
    assert plain == "hm "
    assert (call is None) != (problem is None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CALL_MARK, "never closed"),
        (OUTPUTS[0][:-1], "never closed"),
        (OUTPUTS[0][:30], "never closed"),
        (f"{CALL_MARK} I cannot", "not an object"),
        (f"{CALL_MARK} {{name: f}}", "not JSON"),
        (f"{CALL_MARK} {{'name': 'f'}}", "not JSON"),
        (f"{CALL_MARK} {{}}", 'no "name"'),
        (f'{CALL_MARK} {{"name": ["f"]}}', 'no "name"'),
        (call_with("[1, 2]"), "have type array"),
        (call_with("'null'"), "have type null"),
        (call_with('"Suva"'), "not JSON"),
        (call_with("""'{"a": [1, 2}'"""), "not JSON"),
        (call_with("""'{"a": NaN}'"""), "NaN is not a number"),
        (call_with('\'{"a": ' + "9" * 5000 + "}'"), "not JSON"),
        (call_with('\'{"a": ' + "[" * 30_000 + "]" * 30_000 + "}'"), "nested"),
        (call_with('\'{"a": ' + "[" * 100 + "]" * 100 + "}'"), "nested"),
        (call_with("'" + '{"a": ' * 5_000 + "1" + "}" * 5_000 + "'"), "nested"),
        (call_with('"' + "[" * 30_000 + "]" * 30_000 + '"'), "nested"),
    ],
)
def test_malformed_calls_are_reported(text: str, message: str) -> None:
    plain, call, problem = parse(text, 0)
    assert (plain, call) == ("", None)
    assert problem is not None
    assert message in problem
    assert "\n" not in problem


@pytest.mark.parametrize("piece", [" ", '{"a', "{", "[", '\\"'])
def test_endless_call_is_given_up(piece: str) -> None:
    parser = ToolCallParser()
    parser.feed(CALL_MARK + ("" if piece == " " else "{"))
    for _ in range(MAX_CALL // len(piece) + 1):
        parser.feed(piece)
    assert parser.problem == f"the call is longer than {MAX_CALL} characters"
    assert parser.feed('"name": "f"}') == ""
    assert parser.call is None


# --- the schema -----------------------------------------------------------------------------------


@pytest.mark.parametrize("functions", [FUNCTIONS, json.dumps(FUNCTIONS)])
def test_calls_of_the_goldens_against_their_schemas(functions: Any) -> None:
    assert check_call(CALLS[0], functions) == []
    assert check_call(CALLS[1], functions) == []
    # The golden's own function asks for strings.
    assert check_call(CALLS[2], functions) == [
        "argument a has type integer, not string",
        "argument b has type integer, not string",
    ]


def test_unknown_missing_and_invented() -> None:
    assert check_call(ToolCall("get\nfood", {}), FUNCTIONS) == [
        "there is no function 'get\\nfood'; known: get_weather, get_capital, add_numbers"
    ]
    assert check_call(ToolCall("get_weather", {"a": 11, "b": 11}), FUNCTIONS) == [
        "argument city is missing",
        "there is no argument 'a'",
        "there is no argument 'b'",
    ]
    assert check_call(ToolCall("now", {"zone": "UTC"}), {"name": "now"}) == [
        "there is no argument 'zone'"
    ]


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "string"}, ["", "x"], [1, None, True, [], {}]),
        ({"type": "number"}, [1, 1.5, -2], ["1", True, None]),
        ({"type": "integer"}, [1, 2.0], [1.5, "1", False]),
        ({"type": "boolean"}, [True, False], [0, 1, "true"]),
        ({"type": "array"}, [[], [1, "x"]], [{}, "[]"]),
        ({"type": "object"}, [{}, {"any": 1}], [[], "{}"]),
        ({"type": "null"}, [None], [0, "", False]),
        ({"type": ["string", "null"]}, ["x", None], [1]),
        ({"type": "string", "enum": ["C", "F"]}, ["C"], ["K", "c", 1]),
        ({"enum": [1, "x", None]}, [1, "x", None], [2, "y"]),
        ({"type": "array", "items": {"type": "string"}}, [["a"], []], [[1], ["a", None]]),
        ({"properties": {"a": {"type": "string"}}}, [{}, {"a": "x"}], [{"a": 1}, {"b": "x"}]),
        ({"properties": {}, "additionalProperties": True}, [{"b": "x"}], []),
        ({"type": "object", "required": ["a"]}, [{"a": 1}], [{}, {"b": 1}]),
        # What means nothing asks for nothing.
        ({"type": "date", "enum": 3, "required": True, "properties": []}, [1, "x", {"a": 1}], []),
        ({"type": 7, "required": [[], 1], "items": "x"}, [1, {}, [1]], []),
        ("string", [1, "x"], []),
    ],
)
def test_types_and_enums(schema: Any, good: list[Any], bad: list[Any]) -> None:
    functions = {"name": "f", "parameters": {"type": "object", "properties": {"x": schema}}}
    for value in good:
        assert check_call(ToolCall("f", {"x": value}), functions) == []
    for value in bad:
        problems = check_call(ToolCall("f", {"x": value}), functions)
        assert len(problems) == 1
        assert "argument" in problems[0]


def test_arguments_listed_in_several_schemas_for_one_object_are_known() -> None:
    named = {name: {"properties": {name: {}}} for name in "abc"}
    parameters = {"allOf": [named["a"], {"$ref": "#/$defs/b"}], "$defs": named}
    functions = [{"name": "f", "parameters": parameters}]
    assert check_call(ToolCall("f", {"a": 1, "b": 2}), functions) == []
    assert check_call(ToolCall("f", {"c": 3}), functions) == ["there is no argument 'c'"]


def test_problems_name_the_place_and_stay_short() -> None:
    inner = {"properties": {"city": {}, "unit": {"enum": ["C", "F"]}}, "required": ["city"]}
    functions = {
        "name": "f",
        "parameters": {"properties": {"days": {"type": "array", "items": inner}}},
    }
    call = ToolCall("f", {"days": [{"city": 1, "unit": "C"}, {"unit": "K" * 1000, "x": 1}]})
    problems = check_call(call, functions)
    assert problems[0] == "argument days[1].city is missing"
    assert problems[1].startswith("argument days[1].unit is 'KKK")
    assert problems[1].endswith("', not one of 'C', 'F'")
    assert problems[2] == "there is no argument 'days[1].x'"
    assert max(map(len, problems)) < 120
